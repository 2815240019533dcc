"""Shard folders: a manifest, an index beside each shard, and random access to every sample.

A tar reader skips data silently when a header is damaged. Only counts, offsets and hashes that were
written before the damage can show it. So every folder has ``manifest.json`` (for each shard:
samples, bytes, SHA-256), and every shard ``NAME.tar`` has ``NAME.index.json`` (for each sample: its
key and, for each member, offset and size in the tar; and hashes of pieces of the tar). See
``docs/formats/shards.md``.
"""

import copy
import hashlib
import io
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from multimodal.data.formats.tar import BLOCK
from multimodal.data.members import scan
from multimodal.data.remote.ahead import AHEAD, PLANNER, READERS
from multimodal.data.remote.folder import RemoteFolder, local_folder, opened, remote_folder
from multimodal.data.remote.pieces import DamagedShard as DamagedShard
from multimodal.data.remote.pieces import Piece, parse_pieces, pieces_of, span_of
from multimodal.data.samples import Sample
from multimodal.files import UnreadableFile, open_file, parse_json, read_json, write_json

MANIFEST = "manifest.json"
FORMAT = "multimodal-shards"
VERSION = 1
MAX_INDEXED = 1 << 18  # samples whose index is in memory; a block of training has fewer
_STRINGS, _NUMBERS = ("name", "split", "sha256", "index_sha256"), ("samples", "bytes")


class ShardIndex(NamedTuple):
    """What an index says: ``{"key": KEY, "members": {SUFFIX: [offset, size]}}`` of each sample."""

    samples: list[dict[str, Any]]
    pieces: list[Piece]  # empty in indexes that older releases wrote


def split_of(name: str) -> str:
    """The split of a shard: ``train`` for ``train-0003.tar``, ``all`` for ``0003.tar``."""
    return re.sub(r"[-_.]?\d+$", "", Path(name).stem) or "all"


def file_sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def index_shard(shard: Path, ignored: Counter[str] | None = None) -> dict[str, Any]:
    """Scan one shard and write its index. Arguments as in ``scan``.

    Returns:
        The entry of the shard in the manifest.

    Raises:
        DamagedShard: for a tar that is cut off or unreadable, a repeated key, a repeated member.
    """
    samples: dict[str, dict[str, list[int]]] = {}
    last = None
    for key, suffix, offset, size in scan(shard, ignored):
        members = samples.setdefault(key, {})
        if members and key != last:
            raise DamagedShard(f"{shard}: key {key} appears twice")
        if suffix in members:
            raise DamagedShard(f"{shard}: member {key}.{suffix} appears twice")
        members[suffix] = [offset, size]
        last = key
    if not samples:
        raise DamagedShard(f"{shard}: no samples")
    index = {
        "shard": shard.name,
        "samples": [{"key": k, "members": m} for k, m in samples.items()],
        "pieces": pieces_of(shard, (m.values() for m in samples.values())),
    }
    write_json(index_path(shard), index)
    return {
        "name": shard.name,
        "split": split_of(shard.name),
        "samples": len(samples),
        "bytes": shard.stat().st_size,
        "sha256": file_sha256(shard),
        "index_sha256": file_sha256(index_path(shard)),
    }


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write (key, members) of each sample. The same samples always give the same bytes."""
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")  # with time 0 and no owner
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_manifest(folder: Path, shards: list[dict[str, Any]], **about: object) -> None:
    """Write ``manifest.json``.

    Args:
        folder: holds the shards and their indexes.
        shards: their entries, from ``index_shard``.
        about: more fields, which say how the shards were made.

    Raises:
        DamagedShard: if a key occurs twice in the folder.
    """
    shards = sorted(shards, key=lambda entry: str(entry["name"]))
    seen: dict[str, str] = {}
    for entry in shards:
        for sample in read_index(folder / str(entry["name"])):
            key = sample["key"]
            if key in seen:
                raise DamagedShard(
                    f"key {key} is in {seen[key]} and in {entry['name']}: "
                    "keys must be unique in a folder"
                )
            seen[key] = str(entry["name"])
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "shards": shards, **about})


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check the manifest of a shard folder, or of an address (data/remote/).

    Raises:
        ValueError: if there is no manifest, or one of another version.
        DamagedShard: if the manifest is not valid.
    """
    folder = local_folder(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        how = f"for images: multimodal data build {folder} OUT; for shards: multimodal data index"
        raise ValueError(f"{folder}: no {MANIFEST}; {how} {folder}")
    try:
        manifest = read_json(path)
    except UnreadableFile as error:
        raise DamagedShard(str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedShard(f"{path}: not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {manifest.get('version')}, but this release reads version {VERSION}"
        )
    entries = manifest.get("shards")
    if not isinstance(entries, list) or not entries:
        raise DamagedShard(f"{path}: lists no shards")
    names = set()
    for entry in entries:
        if not isinstance(entry, dict) or not (
            all(isinstance(entry.get(field), str) for field in _STRINGS)
            and all(type(entry.get(field)) is int for field in _NUMBERS)
        ):
            raise DamagedShard(f"{path}: not a valid entry: {str(entry)[:200]}")
        name = entry["name"]
        # A name is joined to the folder's path: it must not lead out of it.
        if "/" in name or "\0" in name or not name.endswith(".tar") or name in names:
            raise DamagedShard(f"{path}: {name!r} is repeated or not the name of a shard")
        if entry["split"] != split_of(name):
            raise DamagedShard(f"{path}: {name} cannot be of split {entry['split']!r}")
        # Each sample has a header of 512 bytes or more.
        if not 0 < entry["samples"] <= entry["bytes"] // BLOCK < 1 << 51:
            raise DamagedShard(f"{path}: {name} cannot have so many samples and bytes")
        names.add(name)
    return manifest


def splits_of(folder: str | Path) -> list[str]:
    """The names of the splits of a shard folder, sorted."""
    return sorted({str(entry["split"]) for entry in read_manifest(folder)["shards"]})


def read_index(shard: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The samples in the index of a local shard. Arguments and errors as in ``open_index``."""
    return open_index(shard, size).samples


def open_index(shard: Path, size: int | None = None) -> ShardIndex:
    """Read the index of a local shard.

    Args:
        size: bytes of the shard, which all members have to lie in. None: not known.

    Raises:
        DamagedShard: if the index is missing or not valid.
    """
    path = index_path(shard)
    if not path.exists():
        raise DamagedShard(f"{path}: missing; run: multimodal data index {shard.parent}")
    try:
        return parse_index(path, read_json(path), size)
    except UnreadableFile as error:
        raise DamagedShard(str(error)) from error


def parse_index(path: Path | str, stored: Any, size: int | None) -> ShardIndex:
    """The content of an index, checked. ``path`` names it in errors, which are DamagedShard."""
    try:
        samples: list[dict[str, Any]] = stored["samples"]
        for sample in samples:
            if not isinstance(sample["key"], str):
                raise TypeError("a key is not a string")
            for offset, length in sample["members"].values():
                if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
                    raise ValueError(f"{sample['key']}: an offset or size is not valid")
                if size is not None and offset + length > size:
                    raise ValueError(f"{sample['key']}: a member ends behind the shard's {size:,}")
        return ShardIndex(samples, parse_pieces(stored.get("pieces"), size))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShard(f"{path}: not a readable index ({error})") from error


class Shards:
    """The samples of one split of a shard folder, by number: ``shards[i] -> Sample``.

    Opening checks the manifest, and that every shard exists and has its size. Reading the first
    sample of a shard checks the SHA-256 of the shard and of its index. No file stays open, and at
    most MAX_INDEXED samples (or one shard) have their index in memory. So a folder can have any
    number of shards, and this object can be sent to worker processes.

    Args:
        folder: a folder with ``manifest.json``, or an address (multimodal/data/remote/).
        split: the split to read. ``None`` reads all of them.
        only: the name of a shard. The others are left out.
        keep: whether a sample of this key is read. The others are left out. By default all are
            read. It must be a function that can be sent to a process.

    Attributes:
        encoding: how the codes were made (multimodal/data/encode.py). None for images.
        sizes: number of samples of each shard.
        is_remote: the folder is at an address.

    Raises:
        ValueError: if the folder or the split does not exist.
        DamagedShard: if a shard or an index differs from the manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        only: str | None = None,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        self.folder, self._keep = local_folder(folder), keep
        self.is_remote = remote_folder(self.folder) is not None
        self._folder = str(self.folder)
        manifest = read_manifest(self.folder)
        self.encoding: dict[str, Any] | None = manifest.get("image_tokenizer")
        splits = sorted({str(s["split"]) for s in manifest["shards"]})
        if split is not None and split not in splits:
            raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
        self._entries = [
            s
            for s in manifest["shards"]
            if split in (None, s["split"]) and only in (None, s["name"])
        ]
        self._verified: set[str] = set()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._planner: Shards | None = None  # a copy, for the thread that reads in advance
        for entry in () if self.is_remote else self._entries:
            self._check_size(entry)
        self.sizes: list[int] = [entry["samples"] for entry in self._entries]
        if keep is not None:
            self.sizes = [len(self._index(number).samples) for number in range(len(self._entries))]
        self._ends = list(accumulate(self.sizes))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": OrderedDict(), "_planner": None}

    @property
    def _remote(self) -> RemoteFolder | None:
        """Each process has its own, so it is not sent to other processes."""
        return opened(self.folder) if self.is_remote else None

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the names, bytes and order of the shards."""
        names = "".join(f"{entry['name']}{entry['sha256']}" for entry in self._entries)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def _check_size(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["name"]
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise DamagedShard(f"{path}: missing, {entry['samples']} samples lost") from error
        if size != entry["bytes"]:
            raise DamagedShard(f"{path}: {size} bytes, the manifest says {entry['bytes']}")

    def _index(self, number: int) -> ShardIndex:
        """The index of a shard."""
        if number in self._indexes:
            self._indexes.move_to_end(number)
            return self._indexes[number]
        entry = self._entries[number]
        path = index_path(self.folder / entry["name"])
        if (remote := self._remote) is not None:
            stored = parse_json(remote.read_index(path.name, entry["index_sha256"]))
            index = parse_index(f"{remote.address}/{path.name}", stored, entry["bytes"])
            valid = True
        else:
            index = ShardIndex(read_index(self.folder / entry["name"], entry["bytes"]), [])
            valid = file_sha256(path) == entry["index_sha256"]
        if not valid or len(index.samples) != entry["samples"]:
            raise DamagedShard(f"{path}: not the index that the manifest knows")
        if self._keep is not None:
            index = index._replace(samples=[s for s in index.samples if self._keep(s["key"])])
        self._indexes[number] = index
        while len(self._indexes) > 1 and self._indexed() > MAX_INDEXED:
            self._indexes.popitem(last=False)
        return index

    def _indexed(self) -> int:
        return sum(len(index.samples) for index in self._indexes.values())

    def _locate(self, i: int) -> tuple[int, dict[str, Any]]:
        """The number of the shard that holds sample i, and the entry of the sample in its index."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        number = bisect_right(self._ends, i)
        first = self._ends[number] - self.sizes[number]
        return number, self._index(number).samples[i - first]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, i: int) -> str:
        return str(self._locate(i)[1]["key"])

    def __getitem__(self, i: int) -> Sample:
        number, indexed = self._locate(i)
        key, members = indexed["key"], indexed["members"]
        if (remote := self._remote) is not None:
            start, stop = span_of(members)
            data = remote.read(self._entries[number], self._index(number).pieces, start, stop)
            places = {suffix: offset - start for suffix, (offset, _) in members.items()}
            return Sample(key, {s: data[p : p + members[s][1]] for s, p in places.items()})
        entry = self._entries[number]
        path = f"{self._folder}/{entry['name']}"
        if entry["name"] not in self._verified:
            if file_sha256(Path(path)) != entry["sha256"]:
                raise DamagedShard(
                    f"{path}: SHA-256 differs from the manifest; "
                    f"run: multimodal data check {self.folder}"
                )
            self._verified.add(entry["name"])
        descriptor = os.open(path, os.O_RDONLY)  # a buffer would not help: each byte is read once
        try:
            contents = {}
            for suffix, (offset, size) in members.items():
                contents[suffix] = os.pread(descriptor, size, offset)
                if len(contents[suffix]) != size:
                    raise DamagedShard(f"{path}: cut off inside {key}.{suffix}")
        finally:
            os.close(descriptor)
        return Sample(key, contents)

    def __iter__(self) -> Iterator[Sample]:
        announced = 0
        for i in range(len(self)):
            if announced < min(len(self), i + AHEAD // 2):
                self.announce(range(announced, announced := min(len(self), i + AHEAD)))
            yield self[i]

    def announce(self, numbers: Sequence[int]) -> None:
        """Begin to bring samples of a remote folder into the cache, and return at once.

        For a local folder it does nothing.
        """
        if self.is_remote:
            self._planner = self._planner or copy.copy(self)
            PLANNER.submit(partial(self._planner._plan, numbers))

    def _plan(self, numbers: Sequence[int]) -> None:
        """Announce the pieces that hold these samples. Needs the indexes of their shards."""
        remote = self._remote
        assert remote is not None
        for number in {bisect_right(self._ends, i) for i in numbers} - self._indexes.keys():
            entry = self._entries[number]
            name = index_path(Path(entry["name"])).name
            READERS.submit(partial(remote.read_index, name, entry["index_sha256"]))
        for i in numbers:
            number, indexed = self._locate(i)
            pieces = self._index(number).pieces
            remote.announce(self._entries[number], pieces, *span_of(indexed["members"]))
