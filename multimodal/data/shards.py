"""Shard folders: a manifest, an index beside each shard, and random access to every sample.

A tar reader skips data silently when a header is damaged. Only counts, offsets and hashes that were
written before the damage can show it. So every folder has ``manifest.json`` (for each shard:
samples, bytes, SHA-256), and every shard ``NAME.tar`` has ``NAME.index.json`` (for each sample: its
key and, for each member, offset and size in the tar). See ``docs/formats.md``.
"""

import hashlib
import io
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from multimodal.data.formats.tar import BLOCK, BadTar, only_zeros, read_members
from multimodal.data.remote import fetch, is_mirror, local_folder
from multimodal.data.samples import Sample
from multimodal.files import UnreadableFile, open_file, read_json, write_json

MANIFEST = "manifest.json"
FORMAT = "multimodal-shards"
VERSION = 1
# Tar writers pad to 10 KiB. A preallocated file that was never filled ends in more zeros.
MAX_PADDING = 1 << 16
MAX_INDEXED = 1 << 18  # samples whose index is in memory; a block of training has fewer
OTHER_MEMBERS = "members that belong to no sample"  # hidden files, files without a suffix
_STRINGS, _NUMBERS = ("name", "split", "sha256", "index_sha256"), ("samples", "bytes")


class DamagedShard(ValueError):
    """A shard differs from its manifest or index."""


def split_of(name: str) -> str:
    """The split of a shard: ``train`` for ``train-0003.tar``, ``all`` for ``0003.tar``."""
    return re.sub(r"[-_.]?\d+$", "", Path(name).stem) or "all"


def file_sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member: split at the first dot after the last slash, as in webdataset.

    Bytes of the key that are not UTF-8 are escaped.

    Returns:
        None for a file that belongs to no sample: hidden (``._a.jpg`` of macOS), in ``__MACOSX``,
        or without a suffix (``README``).
    """
    name = name.encode("utf-8", "backslashreplace").decode()
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not (stem and suffix) or "__MACOSX" in folder.split("/"):
        return None
    return folder + slash + stem, suffix.lower()


def scan(shard: Path, ignored: Counter[str] | None = None) -> Iterator[tuple[str, str, int, int]]:
    """Read the headers of a shard.

    Args:
        shard: a tar.
        ignored: counts OTHER_MEMBERS.

    Yields:
        (key, suffix, offset, size) of each member, in order. Offset and size are in bytes.

    Raises:
        DamagedShard: if the tar is cut off, damaged, or has members that are not plain files.
    """
    try:
        end = 0
        for member in read_members(shard):
            end = member.end
            if member.folder:
                continue
            if not member.plain:
                raise DamagedShard(f"{shard}: member {member.name!r} is not a plain file")
            if (name := split_name(member.name)) is not None:
                yield *name, member.offset, member.size
            elif ignored is not None:
                ignored[OTHER_MEMBERS] += 1
    except BadTar as error:
        raise DamagedShard(f"{shard}: {error}") from error
    except UnreadableFile as error:
        raise DamagedShard(str(error)) from error
    # A block of zeros ends a tar. So the rest must be zeros, and not many.
    size = shard.stat().st_size
    if end > size:
        raise DamagedShard(f"{shard}: cut off, {size} bytes where at least {end} were expected")
    if size - end < 1024:
        raise DamagedShard(f"{shard}: cut off, the end-of-archive blocks are missing")
    if not only_zeros(shard, end, size):
        raise DamagedShard(f"{shard}: unreadable data after byte {end}: a damaged header?")
    if size - end > MAX_PADDING:
        raise DamagedShard(f"{shard}: ends in {size - end} zeros: an unfinished download?")


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
    index = {"shard": shard.name, "samples": [{"key": k, "members": m} for k, m in samples.items()]}
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
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar:
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
    """Read and check the manifest of a shard folder, or of an address (data/remote.py).

    Raises:
        ValueError: if there is no manifest, or one of another version.
        DamagedShard: if the manifest is not valid.
    """
    folder = local_folder(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}; for shards that exist run: multimodal data index {folder}"
        )
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
    """Read the index of a shard: ``{"key": KEY, "members": {SUFFIX: [offset, size]}}`` per sample.

    Args:
        size: bytes of the shard, which all members have to lie in. None: not known.

    Raises:
        DamagedShard: if the index is missing or not valid.
    """
    path = index_path(shard)
    if not path.exists():
        raise DamagedShard(f"{path}: missing; run: multimodal data index {shard.parent}")
    try:
        samples: list[dict[str, Any]] = read_json(path)["samples"]
        for sample in samples:
            if not isinstance(sample["key"], str):
                raise TypeError("a key is not a string")
            for offset, length in sample["members"].values():
                if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
                    raise ValueError(f"{sample['key']}: an offset or size is not valid")
                if size is not None and offset + length > size:
                    raise ValueError(f"{sample['key']}: a member ends behind the shard's {size:,}")
        return samples
    except UnreadableFile as error:
        raise DamagedShard(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShard(f"{path}: not a readable index ({error})") from error


class Shards:
    """The samples of one split of a shard folder, by number: ``shards[i] -> Sample``.

    Opening checks the manifest, and that every shard exists and has its size. Reading the first
    sample of a shard checks the SHA-256 of the shard and of its index. No file stays open, and at
    most MAX_INDEXED samples (or one shard) have their index in memory. So a folder can have any
    number of shards, and this object can be sent to worker processes.

    Args:
        folder: a folder with ``manifest.json``, or an address (multimodal/data/remote.py).
        split: the split to read. ``None`` reads all of them.
        only: the name of a shard. The others are left out.
        keep: whether a sample of this key is read. The others are left out. By default all are
            read. It must be a function that can be sent to a process.

    Attributes:
        encoding: how the codes were made (multimodal/data/encode.py). None for images.
        sizes: number of samples of each shard.

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
        self._mirror = is_mirror(self.folder)
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
        self._indexes: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        for entry in self._entries:
            self._check_size(entry)
        self.sizes: list[int] = [entry["samples"] for entry in self._entries]
        if keep is not None:
            self.sizes = [len(self._index(number)) for number in range(len(self._entries))]
        self._ends = list(accumulate(self.sizes))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the names, bytes and order of the shards."""
        names = "".join(f"{entry['name']}{entry['sha256']}" for entry in self._entries)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def _check_size(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["name"]
        if self._mirror:
            return  # it is downloaded when it is read
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise DamagedShard(f"{path}: missing, {entry['samples']} samples lost") from error
        if size != entry["bytes"]:
            raise DamagedShard(f"{path}: {size} bytes, the manifest says {entry['bytes']}")

    def _index(self, number: int) -> list[dict[str, Any]]:
        """The samples of a shard, from its index."""
        if number in self._indexes:
            self._indexes.move_to_end(number)
            return self._indexes[number]
        entry = self._entries[number]
        path = self.folder / entry["name"]
        self._download(index_path(path), entry["index_sha256"])
        index = read_index(path, entry["bytes"])
        if file_sha256(index_path(path)) != entry["index_sha256"] or len(index) != entry["samples"]:
            raise DamagedShard(f"{index_path(path)}: not the index that the manifest knows")
        if self._keep is not None:
            index = [sample for sample in index if self._keep(sample["key"])]
        self._indexes[number] = index
        while len(self._indexes) > 1 and sum(map(len, self._indexes.values())) > MAX_INDEXED:
            self._indexes.popitem(last=False)
        return index

    def _download(self, path: Path, sha256: str) -> None:
        """Download a file of a remote folder, again if the mirror has an older version."""
        if self._mirror:
            fetch(self.folder, path.name)
            if file_sha256(path) != sha256:
                fetch(self.folder, path.name, again=True)

    def _locate(self, i: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entry of the shard that holds sample i, and the entry of the sample in the index."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        number = bisect_right(self._ends, i)
        first = self._ends[number] - self.sizes[number]
        return self._entries[number], self._index(number)[i - first]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, i: int) -> str:
        return str(self._locate(i)[1]["key"])

    def __getitem__(self, i: int) -> Sample:
        entry, indexed = self._locate(i)
        key, members = indexed["key"], indexed["members"]
        path = f"{self._folder}/{entry['name']}"
        if entry["name"] not in self._verified:
            self._download(Path(path), entry["sha256"])
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
        return (self[i] for i in range(len(self)))
