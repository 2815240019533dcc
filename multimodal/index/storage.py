"""The files of an index: rows, entries, and the configuration that names both.

``entries-HASH.jsonl`` has an entry a line. The number of the line, from 0, is the number of the row
in ``vectors-HASH.usearch``. A line ``null`` is free: its entry was removed, and the next one that
is added takes its place. ``config.json`` moves last. Until then it names the files of before, which
are deleted afterwards. So at every moment the folder holds one whole index.
"""

import json
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np

from multimodal.data.parallel import exclusive_lock
from multimodal.data.shards import file_sha256
from multimodal.files import (
    UnreadableText,
    atomic_file,
    local_path,
    open_file,
    parse_json,
    read_json,
    temporary_path,
)
from multimodal.index.vectors import Vectors
from multimodal.schemas import Between, construct

CONFIG = "config.json"
FORMAT = "multimodal-index"
VERSION = 1
MAX_CONFIG = 1 << 24  # bytes
LOCK = ".lock"
Kind = Literal["images", "texts"]
Count = Annotated[int, Between(0, 2**63 - 1)]


@dataclass(frozen=True)
class Entry:
    """What is known of a row.

    Args:
        root: the number of its folder in the configuration.
        path: of the file in that folder, with /. Or the key of a sample of shards.
        sha256: of the file or the sample, and of how it was cut.
        captions: of an image.
        number: of the sample in its shards. None: a file.
        text: of a piece.
        lines: the first and the last line of the piece in its file, from 1. Empty: an image.
    """

    root: Count
    path: str
    sha256: str
    captions: tuple[str, ...] = ()
    number: Count | None = None
    text: str = ""
    lines: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if len(self.lines) not in (0, 2):
            raise ValueError(f"lines={self.lines}: expected the first and the last")
        path = PurePosixPath(self.path)
        outside = path.is_absolute() or ".." in path.parts or "\0" in self.path
        if self.number is None and (outside or not path.parts):
            raise ValueError(f"path={self.path!r:.200}: leads out of its folder")

    def to_json(self) -> str:
        """One line. Fields that are as by default are left out."""
        default = {item.name: item.default for item in fields(self)}
        values = {name: value for name, value in asdict(self).items() if value != default[name]}
        return json.dumps(values)  # ASCII: a name that is not UTF-8 has lone surrogates


class Entries:
    """The entries of a file, read from it one by one: ``entries[number]``.

    Raises:
        ValueError: names the line that is not an entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as file:  # an empty file cannot be mapped
            size = file.seek(0, 2)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == ord("\n"))
        self._starts = np.concatenate([[0], ends + 1])
        if self._starts[-1] != len(self._data):
            raise ValueError(f"{path}: cut off in its last line")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Entry | None:
        """An entry. None: this number is free."""
        if not 0 <= number < len(self):
            raise ValueError(f"{self.path}: has no line {number + 1}")
        line = self._data[self._starts[number] : self._starts[number + 1]]
        try:
            value = parse_json(bytes(line))
            return None if value is None else construct(Entry, value)
        except UnreadableText as error:
            raise ValueError(f"{self.path}: line {number + 1}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.path}: line {number + 1}: not an entry: {error}") from error

    def __iter__(self) -> Iterator[Entry | None]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True)
class IndexFile:
    name: str
    bytes: Count
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name={self.name!r:.200}: expected the name of a file")

    @classmethod
    def of(cls, path: Path) -> "IndexFile":
        return cls(path.name, path.stat().st_size, file_sha256(path))

    def check(self, folder: Path, *, verify: bool) -> Path:
        """The path. Raises ``ValueError`` if the file is not the one that was written."""
        path = folder / self.name
        with open_file(path) as file:
            size = file.seek(0, 2)
        if size != self.bytes:
            raise ValueError(f"{path}: damaged: {size:,} bytes, expected {self.bytes:,}")
        if verify and file_sha256(path) != self.sha256:
            raise ValueError(f"{path}: damaged: its SHA-256 differs from that in {CONFIG}")
        return path


@dataclass(frozen=True)
class Root:
    """A folder that was indexed. path: absolute. split: of shards; None: all of them, or files."""

    path: str
    split: str | None = None


@dataclass(frozen=True)
class IndexConfig:
    """The configuration of an index.

    Args:
        model: fingerprint of the model whose embeddings these are.
        width: of the embeddings.
        kind: of what is in it. None: nothing yet.
        roots: what was indexed.
        vectors, entries: the files.
        count: number of entries.
    """

    model: str
    width: Annotated[int, Between(1, 1 << 16)]
    vectors: IndexFile
    entries: IndexFile
    kind: Kind | None = None
    roots: tuple[Root, ...] = ()
    count: Count = 0


def read_config(folder: Path) -> IndexConfig:
    """The configuration of an index.

    Raises:
        ValueError: if there is no index, or one of another version, or a damaged one.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no index; run: multimodal index FOLDER_OR_SHARDS {folder}")
    values = read_json(path, MAX_CONFIG)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: not of an index ({FORMAT})")
    if (version := values.pop("version", None)) != VERSION:
        raise ValueError(f"{path}: version {version}, but this release reads version {VERSION}")
    try:
        return construct(IndexConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def read_files(
    folder: Path, config: IndexConfig, *, verify: bool, writable: bool = False
) -> tuple[Vectors, Entries]:
    """The rows and the entries of an index.

    Args:
        verify: compare the hashes of the files with those in the configuration.
        writable: the rows can be changed in memory.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    paths = [each.check(folder, verify=verify) for each in (config.vectors, config.entries)]
    vectors, entries = Vectors(config.width, paths[0], writable=writable), Entries(paths[1])
    if len(vectors) != config.count or len(entries) < config.count:
        raise ValueError(
            f"{folder}: damaged: {len(vectors):,} rows and {len(entries):,} lines of entries, "
            f"expected {config.count:,}"
        )
    return vectors, entries


def write_index(
    folder: Path, config: dict[str, Any], vectors: Vectors, entries: list[Entry | None]
) -> IndexConfig:
    """Write the files of an index, then the configuration, then delete the files of before.

    Args:
        config: the fields of ``IndexConfig`` but ``count`` and the files.
    """
    lines = "".join("null\n" if entry is None else f"{entry.to_json()}\n" for entry in entries)
    written = {}
    for stem, suffix in (("vectors", "usearch"), ("entries", "jsonl")):
        path = folder / f"{stem}.{suffix}"
        part = temporary_path(path)
        try:
            if stem == "vectors":
                vectors.save(part)
            else:
                part.write_text(lines, "utf-8")
            about = IndexFile.of(part)
            name = f"{stem}-{about.sha256[:16]}.{suffix}"
            with atomic_file(folder / name, sync=True) as renamed:
                part.replace(renamed)
        finally:
            part.unlink(missing_ok=True)
        written[stem] = IndexFile(name, about.bytes, about.sha256)
    new = IndexConfig(
        **config, count=len(vectors), vectors=written["vectors"], entries=written["entries"]
    )
    with atomic_file(folder / CONFIG, sync=True) as part:
        values = {"format": FORMAT, "version": VERSION, **asdict(new)}
        part.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    kept = {each.name for each in written.values()}
    for pattern in ("vectors-*.usearch", "entries-*.jsonl", ".*.part"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink(missing_ok=True)
    return new


def locked(folder: Path) -> Any:
    """Hold the folder of an index, which is made where it is missing, for writing.

    Raises:
        ValueError: if another process writes to it, or if it holds something else.
    """
    folder = local_path(folder)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        others = [p.name for p in folder.iterdir() if p.name != LOCK and p.suffix != ".part"]
        names = [n for n in others if not n.startswith(("vectors-", "entries-"))]
        if names:
            raise ValueError(f"{folder}: not empty, and no index; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return exclusive_lock(folder, LOCK)
