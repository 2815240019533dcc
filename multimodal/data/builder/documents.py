"""Interleaved documents in a source: texts and images in an order of their own.

A line of a .jsonl is a document: ``{"content": [{"image": PATH}, {"text": "..."}]}``,
or as OBELICS (Laurençon et al. 2023, arXiv:2306.16527) has them, two lists of one length of which
at each place one is null: ``{"images": [PATH, null], "texts": [null, "..."]}``, or plain text,
``{"text": "..."}`` without a column of images.
"""

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from multimodal.data.builder.records import (
    RejectedSample,
    SourceSample,
    encodable,
    normalise,
    shown,
)
from multimodal.data.builder.tables import IMAGE_COLUMNS, read_rows
from multimodal.data.documents import UnreadableText, content_parts
from multimodal.data.samples import IMAGE_SUFFIXES

LOOKED_AT = 1000  # rows, to tell what a file holds


def is_documents(source: Path) -> bool:
    """Whether the rows of a .jsonl are documents, and not those of a table: by the first readable
    ones, of which plain text has a ``text`` and none names an image."""
    if source.suffix.lower() != ".jsonl":
        return False
    rows = [row for _, row in islice(read_rows(source), LOOKED_AT) if isinstance(row, dict)]
    first = rows[0] if rows else {}
    listed = isinstance(first.get("images"), list) and isinstance(first.get("texts"), list)
    if listed or isinstance(first.get("content"), list):
        return True
    return bool(rows) and all("text" in row and not names_image(row) for row in rows)


def names_image(row: Mapping[str, Any]) -> bool:
    """Whether a row of a table has a column of images, or the path of one anywhere."""
    if {column.lower() for column in row} & {*IMAGE_COLUMNS}:
        return True
    texts = (value.lower() for value in row.values() if isinstance(value, str))
    return any(text.endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)) for text in texts)


def read_documents(source: Path, root: Path) -> Iterator[SourceSample | RejectedSample]:
    """The documents of a .jsonl in their order; root: the folder of their images."""
    for line, row in read_rows(source):
        name = f"{source}: line {line}"
        if isinstance(row, str):
            yield RejectedSample(name, "unreadable row", row)
            continue
        try:
            if not {"content", "images", "texts"} & {*row} and names_image(row):
                raise UnreadableText("it names an image, among rows of plain text")
            paths, content = content_parts(row)
            used = {"content"} & {*row} or {"images", "texts"} & {*row} or {"text"}
            rest = {k: v for k, v in row.items() if k not in {*used, "key"}}
            record = {**normalise(rest), "content": content}
        except UnreadableText as error:
            yield RejectedSample(name, "unreadable text", str(error))
            continue
        inside = [os.path.normpath(path) for path in paths]
        outside = [path for path in inside if path.startswith("..") or os.path.isabs(path)]
        if not content:
            yield RejectedSample(name, "no text")
        elif outside or not all(map(encodable, inside)):
            yield RejectedSample(
                name, "image outside the folder", shown(outside[0] if outside else "?")
            )
        else:
            key = row.get("key")
            hint = key if isinstance(key, str) else f"{source.stem}-{line}"
            images = tuple(root / path for path in inside)
            identity = f"{source.name}/{line}"
            yield SourceSample(name, hint, identity, images, record, document=True)
