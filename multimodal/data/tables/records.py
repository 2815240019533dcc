"""The samples of a source: images with their record, or a sample that cannot be used and why."""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from multimodal.data.formats.column_files import open_columns
from multimodal.data.samples import CAPTION_LINES, Note
from multimodal.files import MAX_FILE, read_bytes
from multimodal.terminal import shown


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
    """An image in a cell of Parquet or Arrow: its bytes, or its path below ``root``."""

    path: Path
    group: int
    row: int
    column: str
    root: Path

    def read(self) -> bytes:
        image = image_in(_column(self.path, self.group, self.column)[self.row].as_py())
        if isinstance(image, str):
            return read_bytes(self.root / image)
        return image


@dataclass(frozen=True)
class Blob:
    """The bytes of an image file that a program gave."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        return self.data


ImagePlace: TypeAlias = Path | Slice | Cell | Blob


@lru_cache(1)  # the rows of a group are read one after the other
def _column(path: Path, group: int, column: str) -> Any:
    import pyarrow as pa

    try:
        return open_columns(path).column(group, column)
    except (pa.ArrowException, OSError, MemoryError) as error:  # of the table, not of the machine
        raise ValueError(f"{path}: row group {group} cannot be read ({error})") from error


def image_in(cell: Any) -> bytes | str:
    """The bytes or the path of the one image in a cell.

    Args:
        cell: bytes, a path, ``{"bytes", "path"}`` as in Hugging Face's datasets, or a list of one
            of these.

    Raises:
        ValueError: if it holds no image, or several.
    """
    if isinstance(cell, list | tuple):
        images = [item for item in cell if item is not None]
        if len(images) > 1:
            raise ValueError(f"the row has {len(images)} images, and a pair has one")
        cell = images[0] if images else None
    if isinstance(cell, dict):
        data = cell.get("bytes")
        cell = data if isinstance(data, bytes) and data else cell.get("path")
    if isinstance(cell, str) and cell.strip():
        return cell.strip()
    if isinstance(cell, bytes) and cell:
        return cell
    raise ValueError("the row has no image")


@dataclass(frozen=True)
class Rows:
    """The rows of a table that a sample comes from.

    Attributes:
        file: the table.
        numbers: of the rows.
        unit: what is counted: ``line`` from 1, ``row`` of Parquet and ``entry`` of JSON from 0.
    """

    file: Path
    numbers: tuple[int, ...]
    unit: str = "line"

    def __str__(self) -> str:
        return f"{shown(self.file)}: {self.unit} {self.numbers[0]}"

    def described(self) -> dict[str, Any]:
        """``{"file": "a.csv", "lines": [3, 4]}``"""
        unit = "entries" if self.unit == "entry" else f"{self.unit}s"
        return {"file": shown(self.file), unit: list(self.numbers)}


@dataclass(frozen=True)
class SourceSample:
    """One image with its record, or the images of a document in their order.

    Attributes:
        name: what messages call it.
        hint: the key it should get.
        identity: differs from every other sample of the source.
        images: where the image files are.
        record: captions, questions and other fields, see ``docs/formats/samples.md``.
        split: the split that it is held out for in the source. None: not held out.
        document: whether the record has a ``content`` that orders the images.
        rows: where its record is, if that is a table.
    """

    name: str
    hint: str
    identity: str
    images: tuple[ImagePlace, ...]
    record: dict[str, Any]
    split: str | None = None
    document: bool = False
    rows: Rows | None = None

    def rejected(self, reason: str, detail: str = "") -> "RejectedSample":
        return RejectedSample(self.name, reason, detail, self.rows)


@dataclass(frozen=True)
class RejectedSample:
    """A sample that cannot be used. There are few reasons, so that they can be counted."""

    name: str
    reason: str
    detail: str = ""
    rows: Rows | None = None

    @classmethod
    def row(cls, rows: Rows, reason: str, detail: str = "") -> "RejectedSample":
        """A row of a table that is no sample."""
        return cls(str(rows), reason, detail, rows)


@dataclass
class Notes:
    """What readers found beside the samples.

    Attributes:
        ignored: files, members and texts that were left out, by kind.
        read: what was read in a way that may surprise, by kind.
        first: where a kind was found first.
    """

    ignored: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Note:
        """Counts what ``record_of`` and ``normalise`` note about a sample."""

        def note(what: str) -> None:
            (self.read if what == CAPTION_LINES else self.ignored)[what] += 1
            self.first.setdefault(what, name)

        return note

    def described(self, counts: Counter[str]) -> dict[str, int]:
        """The counts, each with the sample where it was found first."""
        return {
            f"{what} (first: {self.first[what]})" if what in self.first else what: count
            for what, count in counts.items()
        }


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read.

    Attributes:
        notes: is filled with what is left out.
        images: the folder of the images of a table or of annotations. None: the folder of the file.
        image_column, text_column: of a table. None: guessed from its header.
        need_text: reject samples without captions, questions or label.
        whole_text: a .txt is one caption. Otherwise each of its lines is one.
        answers: the file of the answers to VQA questions.
    """

    notes: Notes = field(default_factory=Notes)
    images: Path | None = None
    image_column: str | None = None
    text_column: str | None = None
    need_text: bool = True
    whole_text: bool = False
    answers: Path | None = None


SourceItem: TypeAlias = SourceSample | RejectedSample


def encodable(name: str) -> bool:
    """Whether a name can be the name of a file. Some lone surrogates cannot."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


# Samples of shards, tables and folders with these names were held out: they must not be trained on.
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "eval", "heldout", "holdout")


def held_out(name: str) -> str | None:
    """The split of a file's or folder's name, if it is held out: test-00000-of-00002 gives test.

    Older files of the Hugging Face Hub have a hash behind it: test-00000-of-00002-a09b74b3ef9c3b56.
    """
    split = re.sub(r"(?:[-_.]?\d+(?:-of-\d+(?:-[0-9a-f]{16})?)?)?$", "", name.lower())
    return split if split in _HELD_OUT else None


def held_out_folder(name: str) -> str | None:
    """The split that the folders of a file were held out for, such as test/dogs/1.jpg."""
    return next(filter(None, map(held_out, name.split("/")[:-1])), None)


def shuffled(names: list[str]) -> list[str]:
    """The names in an order that depends on their hashes only."""
    return sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))
