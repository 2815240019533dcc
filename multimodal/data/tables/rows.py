"""The rows of a table: delimited text with or without a header, JSON Lines, or a list in JSON.

No row decides over another one. A row that cannot be read is given with the reason, and reading
goes on in the next line.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.data.tables.records import Rows
from multimodal.files import UnreadableText, decode_text, parse_json, read_bytes

MAX_TABLE = 1 << 32  # bytes of a table or of annotations; those of Visual Genome have 1 GB
ROW_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".jsonl")
DELIMITERS = {".csv": ",\t|;", ".tsv": "\t|,;", ".txt": "\t,|;", ".token": "\t,|;"}
IMAGE_COLUMNS = (
    *("image", "image_path", "filepath", "file_path", "image_file", "image_name"),
    *("filename", "file_name", "file", "path", "img", "img_path", "images"),
)
_IMAGE_FILE = re.compile(
    r"\s*[^\s|][^\t\n|]*\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf])(?:#\d+)?\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """A row of a table: its fields, or the problem of a row that cannot be read."""

    place: Rows
    fields: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Layout:
    """How a delimited text is read.

    Attributes:
        delimiter: one character.
        names: of the columns. Without a header they are "1", "2", ....
        header: whether the first line holds the names.
        image, text: without a header, the columns that look like these.
    """

    delimiter: str
    names: tuple[str, ...]
    header: bool = True
    image: str | None = None
    text: str | None = None


def read_rows(table: Path, named: Sequence[str] = ()) -> tuple[Layout | None, Iterator[Row]]:
    """The layout of a table, if it is a delimited text, and its rows.

    Args:
        table: a file with a suffix of ROW_SUFFIXES.
        named: columns that are known to be in its header.
    """
    lines = read_lines(table)
    if table.suffix.lower() == ".jsonl":
        return None, _json_rows(table, lines)
    layout = find_layout(lines, DELIMITERS[table.suffix.lower()], named)
    return layout, _delimited_rows(table, lines, layout)


def read_lines(table: Path) -> list[str]:
    """The lines with their ends. A byte that is not UTF-8 becomes a lone surrogate."""
    text = decode_text(read_bytes(table, MAX_TABLE), lossy=True)
    return list(io.StringIO(text, newline=""))


def rows_of(table: Path, entries: Sequence[Any]) -> Iterator[Row]:
    """The rows of a list in a JSON file."""
    for number, entry in enumerate(entries):
        place = Rows(table, (number,), "entry")
        if isinstance(entry, dict):
            yield Row(place, entry)
        else:
            yield Row(place, {}, "not a JSON object")


def _json_rows(table: Path, lines: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = Rows(table, (number,))
        try:
            fields = parse_json(line)
        except UnreadableText as error:
            yield Row(place, {}, str(error))
            continue
        if isinstance(fields, dict):
            yield Row(place, fields)
        else:
            yield Row(place, {}, "not a JSON object")


def _delimited_rows(table: Path, lines: Sequence[str], layout: Layout) -> Iterator[Row]:
    rows = split_rows(lines, layout.delimiter)
    if layout.header:
        next(rows, None)
    for number, cells in rows:
        place = Rows(table, (number,))
        if len(cells) > len(layout.names):
            expected = f"{len(cells)} cells, and the table has {len(layout.names)} columns"
            yield Row(place, {}, f"more cells than columns: {expected}")
        else:
            yield Row(place, _fields(layout.names, cells))


def _fields(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """The cells by their columns. Columns of one name are one field: a list, like two captions."""
    fields: dict[str, Any] = dict(zip(names, cells, strict=False))
    if len(set(names)) < len(names):
        for twice in {name for name in names if names.count(name) > 1}:
            same = [c for name, c in zip(names, cells, strict=False) if name == twice and c.strip()]
            fields[twice] = same if len(same) > 1 else "".join(same)
    return fields


def looks_like_image(cell: str) -> bool:
    """Whether a cell is the name of an image file. ``a.jpg#0`` is one, as in Flickr8k."""
    return _IMAGE_FILE.match(cell) is not None


def find_layout(lines: Sequence[str], delimiters: str, named: Sequence[str] = ()) -> Layout:
    """The delimiter and the columns, from the first line.

    Args:
        lines: of the table.
        delimiters: the candidates, the usual one first.
        named: columns that are known to be in its header.
    """
    first = next((line for line in lines if line.strip()), "")
    known = {*named, *IMAGE_COLUMNS}
    split: dict[str, list[str]] = {}
    for delimiter in delimiters:
        _, cells = next(split_rows([first], delimiter), (0, [""]))
        split[delimiter] = [cell.strip() for cell in cells]
    for delimiter, cells in split.items():
        if known & {*cells, *(cell.lower() for cell in cells)}:
            return Layout(delimiter, tuple(cells))
    for delimiter, cells in split.items():
        images = [number for number, cell in enumerate(cells, 1) if looks_like_image(cell)]
        if len(cells) > 1 and images:
            names = tuple(str(number) for number in range(1, len(cells) + 1))
            text = str(3 - images[0]) if len(cells) == 2 else None
            return Layout(delimiter, names, False, str(images[0]), text)
    delimiter = next((d for d, cells in split.items() if len(cells) > 1), delimiters[0])
    return Layout(delimiter, tuple(split[delimiter]))


def split_rows(lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Split lines to cells, as RFC 4180 says where the text follows it.

    A quoted cell begins and ends with a quote, holds doubled quotes, and can span lines. Many
    tables are written without quoting. There a quote is a letter. So the quote at the begin of a
    cell is a letter if no quote closes the cell, if something follows the closing quote, or if the
    cell would swallow a line that is a row of its own.

    Args:
        lines: with their ends, which quoted cells keep.
        delimiter: one character.

    Yields:
        The number of the first line of each row, from 1, and the cells. Empty lines are left out.
    """
    number = 0
    while number < len(lines):
        if not lines[number].strip("\r\n"):
            number += 1
            continue
        first, cells, start = number + 1, list[str](), 0
        while True:
            line = lines[number].rstrip("\r\n")
            quoted = (
                _quoted(lines, number, start, delimiter) if line[start : start + 1] == '"' else None
            )
            if quoted is not None:
                cell, number, start = quoted
                line = lines[number].rstrip("\r\n")
            else:
                end = line.find(delimiter, start)
                end = len(line) if end < 0 else end
                cell, start = line[start:end], end
            cells.append(cell)
            if start >= len(line):
                break
            start += 1  # behind a delimiter at the end of the line is an empty cell
        number += 1
        yield first, cells


def _quoted(
    lines: Sequence[str], number: int, start: int, delimiter: str
) -> tuple[str, int, int] | None:
    """The quoted cell that begins at a place, and the line and position behind it. None: none."""
    parts: list[str] = []
    position = start + 1
    while True:
        line = lines[number]
        end = position
        while (end := line.find('"', end)) >= 0 and line[end + 1 : end + 2] == '"':
            end += 2
        inside = line[position:] if end < 0 else line[position:end]
        if parts and _is_row(inside, delimiter):
            return None
        parts.append(inside)
        if end >= 0:
            rest = line[end + 1 :].rstrip("\r\n")
            if rest and not rest.startswith(delimiter):
                return None
            return "".join(parts).replace('""', '"'), number, end + 1
        number, position = number + 1, 0
        if number == len(lines):
            return None


def _is_row(text: str, delimiter: str) -> bool:
    """Whether a line inside of a quoted cell is a row that the cell must not swallow."""
    cells = text.split(delimiter)
    return len(cells) > 1 and (delimiter == "\t" or any(map(looks_like_image, cells)))
