"""Read a .jsonl of interleaved documents: texts and images in the order of the document.

A line is one document, in one of three forms:

- ``{"content": [{"image": PATH}, {"text": "..."}]}``
- ``{"images": [PATH, null], "texts": [null, "..."]}``, as in OBELICS (Laurençon et al. 2023,
  arXiv:2306.16527). The lists have the same length, and at each position one of them is null.
- ``{"text": "..."}``, plain text. No column names an image.
"""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from multimodal.data.documents import content_parts
from multimodal.data.samples import IMAGE_SUFFIXES, normalise
from multimodal.data.tables.records import (
    RejectedSample,
    SourceItem,
    SourceSample,
    encodable,
)
from multimodal.data.tables.rows import IMAGE_COLUMNS, read_rows
from multimodal.files import UnreadableText
from multimodal.terminal import shown

SNIFFED_ROWS = 1000  # rows that decide what a file holds


def is_documents(source: Path, text_column: str | None = None) -> bool:
    """Whether a .jsonl holds documents, and not a table of images.

    The first SNIFFED_ROWS rows decide. Plain text has a ``text``, or the column that is given, in
    each of them, and in most of them no image: one text may end with the name of a file. Documents
    of another form have no column of texts.
    """
    if source.suffix.lower() != ".jsonl":
        return False
    rows = [row.fields for row in islice(read_rows(source)[1], SNIFFED_ROWS) if not row.problem]
    first = rows[0] if rows else {}
    images, texts = first.get("images"), first.get("texts")
    listed = (
        isinstance(images, list)
        and isinstance(texts, list)
        and all(text is None or isinstance(text, str) for text in texts)  # no conversation
    )
    if text_column is None and (listed or isinstance(first.get("content"), list)):
        return True
    with_image, column = sum(map(names_image, rows)), text_column or "text"
    return bool(rows) and all(column in row for row in rows) and with_image < len(rows) / 2


def names_image(row: Mapping[str, Any]) -> bool:
    """Whether a row has a column of images, or the path of an image in any column."""
    if {column.lower() for column in row} & {*IMAGE_COLUMNS}:
        return True
    paths = (v.lower() for v in row.values() if isinstance(v, str) and "\n" not in v)
    return any(path.endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)) for path in paths)


def read_documents(
    source: Path, root: Path, text_column: str | None = None
) -> Iterator[SourceItem]:
    """The documents of a .jsonl, in order.

    Args:
        root: the folder of their images.
        text_column: that of plain text. None: ``text``, or documents of another form.
    """
    column = text_column or "text"
    for row in read_rows(source)[1]:
        fields, line = row.fields, row.place.numbers[0]
        if row.problem:
            yield RejectedSample.row(row.place, "unreadable row", row.problem)
            continue
        try:
            form = set() if text_column else {"content", "images", "texts"} & {*fields}
            if not form and names_image(fields):
                raise UnreadableText("it names an image, but the file holds plain text")
            paths, content = content_parts(fields if form else {"text": fields.get(column)})
            used = {"content"} & form or form or {column}
            rest = {k: v for k, v in fields.items() if k not in {*used, "key"}}
            if text_column:
                rest.setdefault("captions", [])  # ``text`` is a field like any other then
            record = {**normalise(rest), "content": content}
        except UnreadableText as error:
            yield RejectedSample.row(row.place, "unreadable text", str(error))
            continue
        paths = [os.path.normpath(path) for path in paths]
        outside = [path for path in paths if path.startswith("..") or os.path.isabs(path)]
        if not content:
            yield RejectedSample.row(row.place, "no text")
        elif outside or not all(map(encodable, paths)):
            where = shown(outside[0]) if outside else "?"
            yield RejectedSample.row(row.place, "image outside the folder", where)
        else:
            key = fields.get("key")
            hint = key if isinstance(key, str) else f"{source.stem}-{line}"
            images = tuple(root / path for path in paths)
            identity = f"{source.name}/{line}"
            yield SourceSample(
                name=str(row.place),
                hint=hint,
                identity=identity,
                images=images,
                record=record,
                document=True,
                rows=row.place,
            )
