"""The samples of a source: images with their record, or a sample that cannot be used and why."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from multimodal.data.documents import UnreadableText
from multimodal.data.samples import parts_of
from multimodal.files import MAX_FILE
from multimodal.terminal import shown as shown


@dataclass(frozen=True)
class Slice:
    """A range of bytes in a file, a shard for instance."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        if self.size > MAX_FILE:
            raise ValueError(f"{self.size:,} bytes, over the limit of {MAX_FILE:,}")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Cell:
    """An image file in a cell of a Parquet table."""

    path: Path
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        value = _row_group(self.path, self.group, self.column)[self.row]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise ValueError(f"column {self.column} holds no file")
        return data


@lru_cache(1)  # the rows of a group are read one after the other
def _row_group(path: Path, group: int, column: str) -> list[Any]:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, [column])[column].to_pylist()


@dataclass(frozen=True)
class SourceSample:
    """One image with its record, or the images of a document in their order.

    Attributes:
        name: what messages call it.
        hint: the key it should get.
        identity: differs from every other sample of the source.
        images: where the image files are.
        record: captions, questions and other fields, see ``docs/formats.md``.
        split: the split that it is held out for in the source. None: not held out.
        document: whether the record has a ``content`` that orders the images.
    """

    name: str
    hint: str
    identity: str
    images: tuple[Path | Slice | Cell, ...]
    record: dict[str, Any]
    split: str | None = None
    document: bool = False


@dataclass(frozen=True)
class RejectedSample:
    """A sample that cannot be used. There are few reasons, so that they can be counted."""

    name: str
    reason: str
    detail: str = ""


SourceItem: TypeAlias = SourceSample | RejectedSample


def encodable(name: str) -> bool:
    """Whether a name can be the name of a file. Some lone surrogates cannot."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def shuffled(names: list[str]) -> list[str]:
    """The names in an order that depends on their hashes only."""
    return sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))


def has_text(record: Mapping[str, Any]) -> bool:
    """Whether a record has a caption, a question, a label or a text of a document."""
    texts = record["captions"] or record.get("qa")
    return bool(texts) or "label" in record or any("text" in part for part in parts_of(record))


def normalise(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the fields of a source into the form of a record.

    Args:
        fields: captions are a string or a list in ``captions``, ``caption`` or ``text``. The first
            of these that is present counts. ``question`` and ``answer`` become a pair of ``qa``.

    Returns:
        ``{"captions": [str], "qa": [[question, answer]], ...}``. Other fields are not changed.

    Raises:
        UnreadableText: if captions or questions have another type.
    """
    rest = dict(fields)
    captions: Any = []
    for name in ("captions", "caption", "text"):
        if rest.get(name) is not None:
            captions = rest.pop(name)
            break
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UnreadableText("captions are not a string or a list of strings")
    record: dict[str, Any] = {"captions": [text.strip() for text in captions if text.strip()]}
    pairs: Any = rest.pop("qa", None) or []
    if isinstance(rest.get("question"), str) and isinstance(rest.get("answer"), str):
        pairs = [*pairs, [rest.pop("question"), rest.pop("answer")]]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise UnreadableText("qa is not a list of [question, answer]")
    if pairs:
        record["qa"] = [list(pair) for pair in pairs]
    return record | rest
