"""One thing found in a source: an image with its record, or what cannot be used, by name."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from multimodal.data.documents import UnreadableText
from multimodal.data.samples import parts_of


@dataclass(frozen=True)
class Slice:
    """Bytes that lie in another file, a shard for instance."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
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


@lru_cache(1)  # the rows of a group are asked for one after the other
def _row_group(path: Path, group: int, column: str) -> list[Any]:
    import pyarrow.parquet as pq

    rows: list[Any] = pq.ParquetFile(path).read_row_group(group, [column])[column].to_pylist()
    return rows


@dataclass(frozen=True)
class SourceSample:
    """One image with its record, or the images of a document in their order.

    ``hint`` is what its key should be, ``identity`` tells it from every other sample of the source,
    ``name`` is what to call it in messages; ``split`` is given where the source held it out;
    ``document``: its record has a ``content`` that orders the images.
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
    """Something found that cannot be used: ``reason`` is of a small set, to be counted."""

    name: str
    reason: str
    detail: str = ""


def shown(path: str | Path) -> str:
    """A path as text that can be printed: bytes that are no UTF-8 become ``\\\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def encodable(name: str) -> bool:
    """Whether a name could be a file's: a lone surrogate that stands for no byte could not."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def shuffled(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))


def has_text(record: Mapping[str, Any]) -> bool:
    said = record["captions"] or record.get("qa")
    return bool(said) or "label" in record or any("text" in part for part in parts_of(record))


def normalise(given: Mapping[str, Any]) -> dict[str, Any]:
    """``{"captions": [str], "qa": [[question, answer]], ...}`` from what people write.

    The captions are the first of ``captions``, ``caption``, ``text`` that is there, a string or a
    list; ``question`` and ``answer`` become a pair of ``qa``. All other keys are passed on.
    """
    rest = dict(given)
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
