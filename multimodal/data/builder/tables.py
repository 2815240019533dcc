"""Read tables of images and texts as samples: .csv, .tsv, .jsonl, and .parquet with pyarrow."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.data.builder.records import (
    Cell,
    RejectedSample,
    SourceItem,
    SourceSample,
    encodable,
    has_text,
    normalise,
    shown,
    shuffled,
)
from multimodal.data.documents import UnreadableText

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE_COLUMNS = (
    *("image", "image_path", "filepath", "file_path", "image_file"),
    *("filename", "file_name", "file", "path", "img"),
)
TEXT_COLUMNS = ("captions", "caption", "text", "title", "description", "prompt", "alt")


def read_rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row) of each row of a table. For a row that cannot be read, the reason."""
    # surrogateescape: a line that is not UTF-8 is rejected later, without the other lines.
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if table.suffix.lower() == ".jsonl":
            for line, text in enumerate(file, 1):
                if text.strip():
                    try:
                        row = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        yield line, f"not readable as JSON ({error})"
                        continue
                    yield line, row if isinstance(row, dict) else "not a JSON object"
            return
        delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                more = None in cells
                yield reader.line_num, "more cells than columns" if more else dict(cells)
        except csv.Error as error:
            raise ValueError(f"{table}: line {reader.line_num}: {error}") from error


def _choose(table: Path, columns: list[str], given: str | None, kind: str) -> str | None:
    """The given column, or the first column that has one of the usual names."""
    if given is not None:
        if given not in columns:
            raise ValueError(f"{table}: no column {given!r}; it has {', '.join(columns)}")
        return given
    usual = IMAGE_COLUMNS if kind == "image" else TEXT_COLUMNS
    lowered = {column.strip().lower(): column for column in reversed(columns)}
    return next((lowered[name] for name in usual if name in lowered), None)


@dataclass(frozen=True)
class _Columns:
    """The columns of a table that hold the image and, if there is one, the text."""

    image: str
    text: str | None

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """The record of a row without its image column."""
        text = row.pop(self.text, None) if self.text else None
        others = {key: value for key, value in row.items() if value not in (None, "")}
        return normalise(others | ({"captions": text} if text is not None else {}))


def _find_columns(
    table: Path, columns: list[str], image: str | None, text: str | None, need_text: bool
) -> _Columns:
    image = _choose(table, columns, image, "image")
    text = _choose(table, columns, text, "text")
    has_texts = text or {"qa", "question", "label"} & {*columns}
    for kind, missing in (("image", not image), ("text", need_text and not has_texts)):
        if missing:
            raise ValueError(
                f"{table}: which column is the {kind}? It has {', '.join(columns) or 'none'}; "
                f"name it with --{kind}-column"
            )
    return _Columns(str(image), text)


def read_table(
    table: Path,
    root: Path,
    ignored: "Counter[str]",
    image_column: str | None,
    text_column: str | None,
    need_text: bool,
) -> Iterator[SourceItem]:
    """Read a .csv, .tsv or .jsonl. Arguments as in ``read_source``. root: folder of the images."""
    rows = list(read_rows(table))
    names = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    columns = _find_columns(table, names, image_column, text_column, need_text)
    yield from _join_rows(table, rows, columns, root, ignored, need_text)


def read_parquet(
    table: Path,
    root: Path,
    ignored: "Counter[str]",
    image_column: str | None,
    text_column: str | None,
    need_text: bool,
) -> Iterator[SourceItem]:
    """Read a .parquet. Arguments as in ``read_table``.

    The image column holds paths, as in other tables, or image files. A file is a value of bytes, or
    ``{"bytes", "path"}`` as in Hugging Face's datasets. Then each row is a sample.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{table}: to read it, install pyarrow: pip install pyarrow") from error
    try:
        file = pq.ParquetFile(table)
        names = file.schema_arrow.names
        columns = _find_columns(table, names, image_column, text_column, need_text)
        kind = file.schema_arrow.field(columns.image).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
            yield from _join_rows(table, enumerate(rows), columns, root, ignored, need_text)
            return
        # Only the other columns are read here. Each image file is read when it is needed.
        others = [name for name in names if name != columns.image]
        has_paths = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        number = 0
        for group in range(file.num_row_groups):
            read = [*others, f"{columns.image}.path"] if has_paths else others
            rows_of_group = file.read_row_group(group, read).to_pylist() if read else []
            for row_number in range(file.metadata.row_group(group).num_rows):
                row = rows_of_group[row_number] if rows_of_group else {}
                path = (row.pop(columns.image) or {}).get("path") if has_paths else None
                name = f"{table}: row {number}"
                hint = (
                    Path(path).stem if isinstance(path, str) and path else f"{table.stem}-{number}"
                )
                cell = Cell(table, group, row_number, columns.image)
                try:
                    record = columns.record(row)
                    yield SourceSample(name, shown(hint), f"{table.name}/{number}", (cell,), record)
                except UnreadableText as error:
                    yield RejectedSample(name, "unreadable text", str(error))
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table}: not readable as Parquet ({error})") from error


def _join_rows(
    table: Path,
    rows: Iterable[tuple[int, dict[str, Any] | str]],
    columns: _Columns,
    root: Path,
    ignored: "Counter[str]",
    need_text: bool,
) -> Iterator[SourceItem]:
    """Join the rows of an image to one sample. Other columns stay if all its rows agree."""
    groups: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, Path] = {}
    for line, row in rows:
        name = f"{table}: line {line}"
        if isinstance(row, str):
            yield RejectedSample(name, "unreadable row", row)
            continue
        image = row.pop(columns.image, None)
        if not isinstance(image, str) or not image.strip():
            yield RejectedSample(name, "no image", f"column {columns.image} is empty")
            continue
        if not encodable(image):
            yield RejectedSample(name, "no image", "its file name is not Unicode")
            continue
        try:
            record = columns.record(row)
        except UnreadableText as error:
            yield RejectedSample(name, "unreadable text", str(error))
            continue
        if need_text and not has_text(record):
            yield RejectedSample(name, "no text")
            continue
        path = root / image.strip()
        relative = os.path.relpath(path, root)  # the same for a.jpg, ./a.jpg, /full/a.jpg
        paths.setdefault(relative, path)
        groups.setdefault(relative, []).append(record)
    for relative in shuffled(list(groups)):
        record, path = _join(groups[relative], ignored), paths[relative]
        hint = shown(os.path.splitext(relative)[0])
        yield SourceSample(shown(path), hint, shown(relative), (path,), record)


def _join(records: list[dict[str, Any]], ignored: "Counter[str]") -> dict[str, Any]:
    joined: dict[str, Any] = {"captions": [], "qa": []}
    for record in records:
        joined["captions"] += record["captions"]
        joined["qa"] += record.get("qa", [])
    for name in dict.fromkeys(name for record in records for name in record):
        if name not in ("captions", "qa"):
            if all(record.get(name) == records[0].get(name) for record in records):
                joined[name] = records[0][name]
            else:
                ignored[f"columns {name} (rows of one image differ)"] += 1
    if not joined["qa"]:
        del joined["qa"]
    return joined
