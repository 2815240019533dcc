"""Files of columns, group by group: Parquet, and Arrow as Hugging Face's datasets store it.

A group is a row group of Parquet or a record batch of Arrow. Arrow is mapped into memory, so only
what is read takes memory. Every batch is validated: its offsets come from a stranger's file.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from multimodal.files import open_file

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN_SUFFIXES = (".parquet", ".arrow")
BATCH = 256  # rows that are in memory at a time


class ParquetTable:
    """A Parquet file.

    Attributes:
        schema: names and types of its columns.
        sizes: rows of each group.
        problem: why rows after the last group may be missing. Empty for Parquet.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path)
        self.schema: pa.Schema = self._file.schema_arrow
        groups = range(self._file.num_row_groups)
        self.sizes = [self._file.metadata.row_group(number).num_rows for number in groups]
        self.problem = ""

    def batches(self, group: int, names: Sequence[str]) -> Iterator["pa.RecordBatch"]:
        """Some columns of a group. ``COLUMN.FIELD`` is one field of a column of structs."""
        yield from self._file.iter_batches(BATCH, [group], names) if names else ()

    def column(self, group: int, name: str) -> Any:
        """The values of a column of a group.

        They are read in batches: Arrow refuses a column of structs with over 2 GiB at once.
        """
        import pyarrow as pa

        return pa.Table.from_batches(self._file.iter_batches(BATCH, [group], [name]))[name]

    def is_null(self, column: str, field: str) -> bool:
        """Whether a field of a column of structs is known to have no value in any row."""
        metadata = self._file.metadata
        paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        leaves = [number for number, path in enumerate(paths) if path == f"{column}.{field}"]
        groups = [metadata.row_group(number) for number in range(len(self.sizes))]
        return bool(leaves) and all(
            group.column(leaf).statistics is not None
            and group.column(leaf).statistics.null_count == group.num_rows
            for group in groups
            for leaf in leaves
        )


class ArrowTable:
    """A file of Arrow, in its form for streams or in that for files. Attributes: ParquetTable."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        reader, self._is_file = self._reader()
        self.schema: pa.Schema = reader.schema
        self.sizes: list[int] = []
        self.problem = ""
        try:
            for batch in self._all(reader):
                self.sizes.append(batch.num_rows)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            self.problem = f"the file cannot be read from here on ({error})"

    def _reader(self) -> tuple[Any, bool]:
        import pyarrow as pa

        mapped = pa.memory_map(os.fsencode(self._path))
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(mapped), is_file

    def _all(self, reader: Any) -> Iterator["pa.RecordBatch"]:
        if self._is_file:
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader

    def _batch(self, group: int) -> "pa.RecordBatch":
        reader, _ = self._reader()
        if self._is_file:
            batch = reader.get_batch(group)
        else:  # what comes before is skipped: of a mapped file only its headers are read
            batch = next(b for number, b in enumerate(reader) if number == group)
        batch.validate(full=True)
        return batch

    def batches(self, group: int, names: Sequence[str]) -> Iterator["pa.RecordBatch"]:
        """As ``ParquetTable.batches``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not names:
            return
        batch = self._batch(group)
        columns: dict[str, Any] = {}
        for name in names:
            if name in batch.schema.names:
                columns[name] = batch[name]
            else:
                column, _, field = name.rpartition(".")
                columns[column] = pa.StructArray.from_arrays(
                    [pc.struct_field(batch[column], field)], [field]
                )
        chosen = pa.RecordBatch.from_pydict(columns)
        for start in range(0, batch.num_rows, BATCH):
            yield chosen.slice(start, BATCH)

    def column(self, group: int, name: str) -> Any:
        """As ``ParquetTable.column``."""
        return self._batch(group)[name]

    def is_null(self, column: str, field: str) -> bool:
        """As ``ParquetTable.is_null``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            return all(
                pc.struct_field(self._batch(group)[column], field).null_count == size
                for group, size in enumerate(self.sizes)
            )
        except (pa.ArrowException, OSError, ValueError, MemoryError):
            return False  # the rows of a damaged group are rejected when they are read


ColumnFile: TypeAlias = ParquetTable | ArrowTable


def open_columns(path: Path) -> ColumnFile:
    """A file with a suffix of COLUMN_SUFFIXES.

    Raises:
        ValueError: if it cannot be read, or without pyarrow.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ValueError(f"{path}: to read it, install pyarrow: pip install pyarrow") from error
    is_arrow = path.suffix.lower() == ".arrow"
    open_file(path).close()  # only regular files
    try:
        return ArrowTable(path) if is_arrow else ParquetTable(path)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())  # of several lines
        kind = "Arrow" if is_arrow else "Parquet"
        raise ValueError(f"{path}: not readable as {kind} ({reason})") from error


def class_names(schema: "pa.Schema") -> Mapping[str, Sequence[str]]:
    """The names of the classes in columns of numbers, as Hugging Face's datasets note them."""
    found: dict[str, Sequence[str]] = {}
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for column, feature in features.items():
            names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                found[column] = names
    return found


def name_classes(fields: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Fields with the names of classes in place of their numbers. -1 is "not known"."""
    for column, classes in names.items():
        number = fields.get(column)
        if isinstance(number, int) and not isinstance(number, bool):
            fields[column] = classes[number] if 0 <= number < len(classes) else None
    return fields
