"""From the rows of a table to samples: which columns count, and the rows of an image joined."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.data.formats.folders import IMAGE_SUFFIXES
from multimodal.data.samples import CONVERSATION_FIELDS, Note, has_text, normalise
from multimodal.data.tables.records import (
    ReadOptions,
    RejectedSample,
    Rows,
    SourceItem,
    SourceSample,
    encodable,
    image_in,
    shuffled,
)
from multimodal.data.tables.rows import IMAGE_COLUMNS, Layout, Row
from multimodal.files import UnreadableText
from multimodal.terminal import shown

TEXT_COLUMNS = (
    *("captions", "caption", "text", "title", "description", "prompt", "alt"),
    *("comment", "sentence", "txt"),
)
# Shards as a table, of img2dataset or of a conversion, have columns named as members: jpg, txt.
_IMAGE_COLUMNS = (*IMAGE_COLUMNS, *IMAGE_SUFFIXES)
_OTHER_TEXTS = {"qa", "question", "label", *CONVERSATION_FIELDS}
_NUMBERED = re.compile(r"(\.\w+)#\d+$")  # a.jpg#0: the first caption of a.jpg, in Flickr8k


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold the image and, if there is one, the text."""

    image: str
    text: str | None

    def record(self, row: Mapping[str, Any], note: Note) -> dict[str, Any]:
        """The record of a row without its image column."""
        used = (self.image, self.text)
        fields = {k: v for k, v in row.items() if k not in used and not _is_missing(v)}
        if self.text is not None and not _is_missing(row.get(self.text)):
            fields["captions"] = row[self.text]
        return normalise(fields, note)

    def checked(self, row: Row, options: ReadOptions) -> dict[str, Any] | RejectedSample:
        """The record of a row, or why it has none."""
        try:
            record = self.record(row.fields, options.notes.of(str(row.place)))
        except UnreadableText as error:
            return RejectedSample.row(row.place, "unreadable text", str(error))
        if options.need_text and not has_text(record):
            return RejectedSample.row(row.place, "no text")
        return record


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)


def find_columns(
    table: Path, names: Sequence[str], options: ReadOptions, layout: Layout | None = None
) -> Columns:
    """The columns that the options name. Otherwise the first that has a usual name.

    Raises:
        ValueError: if there is no such column.
    """
    guess = (layout.image, layout.text) if layout is not None else (None, None)
    image = _choose(table, names, options.image_column, _IMAGE_COLUMNS) or guess[0]
    text = _choose(table, names, options.text_column, TEXT_COLUMNS) or guess[1]
    has_texts = text or _OTHER_TEXTS & {*names}
    needs_text = options.need_text and not has_texts
    for kind, missing in (("image", not image), ("text", needs_text)):
        if missing:
            raise ValueError(
                f"{table}: which column is the {kind}? It has {', '.join(names) or 'none'}; "
                f"name it with --{kind}-column"
            )
    return Columns(str(image), text)


def _choose(
    table: Path, names: Sequence[str], given: str | None, usual: Sequence[str]
) -> str | None:
    if given is not None:
        if given not in names:
            raise ValueError(f"{table}: no column {given!r}; it has {', '.join(names)}")
        return given
    lowered = {name.strip().lower(): name for name in reversed(names)}
    return next((lowered[name] for name in usual if name in lowered), None)


def join_rows(
    table: Path, rows: Iterable[Row], columns: Columns, options: ReadOptions
) -> Iterator[SourceItem]:
    """Join the rows of an image to one sample. Other columns stay if all its rows agree."""
    root = options.images or table.parent
    groups: dict[str, list[tuple[Rows, dict[str, Any]]]] = {}
    paths: dict[str, Path] = {}
    for row in rows:
        if row.problem:
            yield RejectedSample.row(row.place, "unreadable row", row.problem)
            continue
        try:
            image = image_in(row.fields.get(columns.image))
        except ValueError as error:
            detail = f"column {columns.image}: {error}"
            yield RejectedSample.row(row.place, "no image", detail)
            continue
        if not isinstance(image, str) or not encodable(image):
            yield RejectedSample.row(row.place, "no image", "its file name is not Unicode")
            continue
        if "://" in image:
            detail = f"{image} is an address; download the images first, with img2dataset for one"
            yield RejectedSample.row(row.place, "no image", detail)
            continue
        record = columns.checked(row, options)
        if isinstance(record, RejectedSample):
            yield record
            continue
        path = root / _NUMBERED.sub(r"\1", image)
        relative = os.path.relpath(path, root)  # the same for a.jpg, ./a.jpg, /full/a.jpg
        paths.setdefault(relative, path)
        groups.setdefault(relative, []).append((row.place, record))
    for relative in shuffled(list(groups)):
        places, records = zip(*groups.pop(relative), strict=True)
        path = paths[relative]
        yield SourceSample(
            name=shown(path),
            hint=shown(os.path.splitext(relative)[0]),
            identity=shown(relative),
            images=(path,),
            record=_join(records, options.notes.ignored),
            rows=Rows(table, tuple(n for place in places for n in place.numbers), places[0].unit),
        )


def _join(records: Sequence[dict[str, Any]], ignored: Counter[str]) -> dict[str, Any]:
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
