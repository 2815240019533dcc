"""Read a table of columns, Parquet or Arrow, as Hugging Face's datasets and img2dataset write them.

The image column holds paths, or image files. A file is a value of bytes, or ``{"bytes", "path"}``,
where one of them is enough, or a list of one of these. Rows with paths are joined, as in other
tables. Each row with a file is a sample.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.data.formats.column_files import (
    ColumnFile,
    class_names,
    name_classes,
    open_columns,
)
from multimodal.data.tables.columns import Columns, find_columns, join_rows
from multimodal.data.tables.records import (
    Cell,
    ReadOptions,
    RejectedSample,
    Rows,
    SourceItem,
    SourceSample,
)
from multimodal.data.tables.rows import Row
from multimodal.terminal import shown

if TYPE_CHECKING:
    import pyarrow as pa


class _Unreadable:
    """A value that cannot be read. It is no text, and no image."""

    def __str__(self) -> str:
        return ""


def read_columnar(table: Path, options: ReadOptions) -> Iterator[SourceItem]:
    """The samples of a table.

    Raises:
        ValueError: if the file as a whole cannot be read. Rows that cannot be read are rejected.
    """
    file = open_columns(table)
    columns = find_columns(table, file.schema.names, options)
    for name in (columns.image, columns.text):
        if file.schema.names.count(name) > 1:
            raise ValueError(f"{table}: two columns are called {name!r}; rename one")
    kind = file.schema.field(columns.image).type
    if not _holds_bytes(kind) or (
        _has_field(kind, "bytes") and file.is_null(columns.image, "bytes")
    ):
        yield from join_rows(table, column_rows(table, file, file.schema.names), columns, options)
    else:
        yield from _read_files(table, file, columns, options)


def _has_field(kind: "pa.DataType", name: str) -> bool:
    """Whether a type is a struct with such a field."""
    return hasattr(kind, "get_field_index") and kind.get_field_index(name) >= 0


def _holds_bytes(kind: "pa.DataType") -> bool:
    """Whether values of a type can hold image files."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_bytes(kind.storage_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    return not (
        pa.types.is_null(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )


def column_rows(table: Path, file: ColumnFile, names: list[str]) -> Iterator[Row]:
    """All rows, in order. A row whose group cannot be read has a problem."""
    import pyarrow as pa

    number, classes = 0, class_names(file.schema)
    for group, count in enumerate(file.sizes):
        done, problem = 0, ""
        try:
            for batch in file.batches(group, names):
                for fields in _fields(batch):
                    place = Rows(table, (number + done,), "row")
                    yield Row(place, name_classes(fields, classes))
                    done += 1
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            problem = f"row group {group} cannot be read ({error})"
        for rest in range(done, count):
            yield Row(Rows(table, (number + rest,), "row"), {}, problem)
        number += count
    if file.problem:
        yield Row(Rows(table, (number,), "row"), {}, file.problem)


def _fields(batch: "pa.RecordBatch") -> Iterator[dict[str, Any]]:
    """The rows of a batch. A value that Python has no form for is _Unreadable."""
    values: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column.to_pylist()
        except Exception:  # each type has its own errors: a year 10000, bytes that are not UTF-8
            values[name] = [_value(scalar) for scalar in column]
    for number in range(batch.num_rows):
        yield {name: column[number] for name, column in values.items()}


def _value(scalar: "pa.Scalar") -> Any:
    try:
        return scalar.as_py()
    except Exception:
        return _Unreadable()


def _read_files(
    table: Path, file: ColumnFile, columns: Columns, options: ReadOptions
) -> Iterator[SourceItem]:
    """A sample a row. Only the other columns are read here, and the image when it is needed."""
    root = options.images or table.parent
    names = [name for name in file.schema.names if name != columns.image]
    if _has_field(file.schema.field(columns.image).type, "path"):
        names.append(f"{columns.image}.path")
    starts, number = [], 0
    for size in file.sizes:
        starts.append(number)
        number += size
    group = -1
    for row in column_rows(table, file, names):
        number = row.place.numbers[0]
        while group + 1 < len(starts) and starts[group + 1] <= number:
            group += 1
        if row.problem:
            yield RejectedSample.row(row.place, "unreadable row", row.problem)
            continue
        image = row.fields.get(columns.image)  # not a dict if its path is not UTF-8
        path = image.get("path") if isinstance(image, dict) else None
        hint = Path(path).stem if isinstance(path, str) else ""
        record = columns.checked(row, options)
        if isinstance(record, RejectedSample):
            yield record
            continue
        yield SourceSample(
            name=str(row.place),
            hint=shown(hint or f"{table.stem}-{number}"),
            identity=f"{table.name}/{number}",
            images=(Cell(table, group, number - starts[group], columns.image, root),),
            record=record,
            rows=row.place,
        )
