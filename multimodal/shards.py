"""Shard folders: a manifest, an index beside each shard, and random access to every sample.

A tar reader drops data in silence when a header is damaged; only counts, offsets and hashes
written beforehand can notice. So every folder has ``manifest.json`` (per shard: samples, bytes,
SHA-256) and every shard ``NAME.tar`` has ``NAME.index.json`` (per sample: its key and, for each
member, the offset and size of its bytes in the tar). See ``docs/formats.md``.
"""

import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MANIFEST = "manifest.json"
FORMAT = "multimodal-shards"
VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("json", "txt")
CODES = "codes.npy"  # in the place of an image: see multimodal/pretokenise.py
# Nothing here unpickles, but webdataset's decoder does: these members can run code elsewhere.
PICKLE_SUFFIXES = ("pkl", "pickle", "pyd", "pt", "pth", "joblib")
# Tar writers pad to 10 KiB; a preallocated file that was never filled ends in more.
MAX_PADDING = 1 << 16
_STRINGS, _NUMBERS = ("name", "split", "sha256", "index_sha256"), ("samples", "bytes")


class DamagedShard(ValueError):
    """A shard that is not what its manifest or index says."""


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in the shard: ``members`` maps a suffix ("jpg") to its bytes."""

    key: str
    members: Mapping[str, bytes]

    @property
    def image(self) -> bytes:
        """The bytes of the image, still encoded."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.members:
                return self.members[suffix]
        raise ValueError(f"sample {self.key} has no image: members are {sorted(self.members)}")

    @property
    def codes(self) -> "NDArray[np.int64]":
        """int64[A, h, w]: A encodings of the image, in shards that hold codes."""
        import numpy as np

        if CODES not in self.members:
            raise ValueError(f"sample {self.key} has no codes: members are {sorted(self.members)}")
        data = self.members[CODES]
        try:
            file = io.BytesIO(data)
            np.lib.format.read_magic(file)
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            if math.prod(shape) * kind.itemsize != len(data) - file.tell():
                raise ValueError("its size is not the one it names")  # before memory is asked for
            codes = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # of a damaged header numpy raises almost anything
            raise ValueError(f"sample {self.key}: its codes are not readable ({error})") from error
        if codes.ndim != 3 or not len(codes) or codes.dtype.kind != "u":
            raise ValueError(
                f"sample {self.key}: codes of shape {codes.shape} and type {codes.dtype}, "
                "expected unsigned [A, h, w]"
            )
        found: NDArray[np.int64] = codes.astype(np.int64)
        return found

    @property
    def record(self) -> dict[str, Any]:
        """What ``KEY.json`` says; a ``KEY.txt`` reads as one caption."""
        if "json" in self.members:
            try:
                record = json.loads(self.members["json"])
            except ValueError as error:
                raise ValueError(
                    f"sample {self.key}: its json is not readable ({error})"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"sample {self.key}: its json is not an object")
            return record
        if "txt" in self.members:
            try:
                return {"captions": [self.members["txt"].decode("utf-8").strip()]}
            except ValueError as error:
                raise ValueError(f"sample {self.key}: its txt is not UTF-8 ({error})") from error
        return {}


def texts_of(record: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a record: captions, questions and answers."""
    yield from record.get("captions", [])
    for question, answer in record.get("qa", []):
        yield question
        yield answer


def split_of(name: str) -> str:
    """``train-0003.tar`` is of split ``train``; a name without a number is a split of its own."""
    return re.sub(r"[-_.]?\d+$", "", Path(name).stem) or "all"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def split_name(name: str) -> tuple[str, str]:
    """A member's (key, suffix): split at the first dot after the last slash, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem if stem else ""), suffix.lower()


def only_zeros(path: Path, start: int, stop: int) -> bool:
    """Whether the bytes of a file from ``start`` to ``stop`` are all zero."""
    with open(path, "rb") as file:
        file.seek(start)
        for position in range(start, stop, 1 << 20):
            if file.read(min(1 << 20, stop - position)).strip(b"\0"):
                return False
    return True


def _scan(shard: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, offset, size) of each member, in order; damage of any kind is an error."""
    try:
        with tarfile.open(shard, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DamagedShard(f"{shard}: member {member.name!r} is not a plain file")
                key, suffix = split_name(member.name)
                if not (key and suffix):
                    raise DamagedShard(f"{shard}: member {member.name!r} is not KEY.SUFFIX")
                end += -(-member.size // 512) * 512
                yield key, suffix, member.offset_data, member.size
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise DamagedShard(f"{shard}: {error}") from error
    # tarfile takes a damaged header in the middle for the end: what follows must be zeros.
    size = shard.stat().st_size
    if end > size:
        raise DamagedShard(f"{shard}: cut off, {size} bytes where at least {end} were expected")
    if size - end < 1024:
        raise DamagedShard(f"{shard}: cut off, the end-of-archive blocks are missing")
    if not only_zeros(shard, end, size):
        raise DamagedShard(f"{shard}: unreadable data after byte {end}: a damaged header?")
    if size - end > MAX_PADDING:
        raise DamagedShard(f"{shard}: ends in {size - end} zeros: an unfinished download?")


def index_shard(shard: Path) -> dict[str, Any]:
    """Scan one shard and write its index; returns its manifest entry.

    Errors: ``DamagedShard`` for a cut or unreadable tar, a repeated key, a member given twice.
    """
    samples: dict[str, dict[str, list[int]]] = {}
    last = None
    for key, suffix, offset, size in _scan(shard):
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
    """Write (key, members) of every sample: the same samples, the same bytes."""
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")  # time 0, nobody's
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_manifest(folder: Path, shards: list[dict[str, Any]], **about: object) -> None:
    """Write ``manifest.json``; ``about`` records how the shards were made."""
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder; a clear error where there is none or it is not ours."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}; for shards that exist run: multimodal data index {folder}"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DamagedShard(f"{path}: not readable as JSON ({error})") from error
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
            raise DamagedShard(f"{path}: an entry that is not as it should be: {entry}")
        name = entry["name"]
        # A name is joined to the folder's path: it must not lead out of it.
        if "/" in name or "\0" in name or not name.endswith(".tar") or name in names:
            raise DamagedShard(f"{path}: {name!r} is repeated or not the name of a shard")
        if entry["split"] != split_of(name):
            raise DamagedShard(f"{path}: {name} cannot be of split {entry['split']!r}")
        names.add(name)
    return manifest


def splits_of(folder: str | Path) -> list[str]:
    """The splits of a shard folder, by name."""
    return sorted({str(entry["split"]) for entry in read_manifest(Path(folder))["shards"]})


def read_index(shard: Path) -> list[dict[str, Any]]:
    """The samples of a shard as its index lists them; ``DamagedShard`` if it is not readable."""
    path = index_path(shard)
    try:
        samples: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["samples"]
        for sample in samples:
            if not isinstance(sample["key"], str):
                raise TypeError("a key is not a string")
            for offset, size in sample["members"].values():
                if type(offset) is not int or type(size) is not int or min(offset, size) < 0:
                    raise ValueError(f"{sample['key']}: an offset or size that cannot be")
        return samples
    except FileNotFoundError as error:
        raise DamagedShard(f"{path}: missing; run: multimodal data index {shard.parent}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedShard(f"{path}: not a readable index ({error})") from error


class Shards:
    """The samples of one split of a shard folder, by number: ``shards[i] -> Sample``.

    Opening checks the manifest, the presence and size of every shard and every index; the first
    read of a shard checks its SHA-256. Keeps no file open, so it can be sent to worker processes.

    Args:
        folder: a folder with ``manifest.json``.
        split: which split; ``None`` means all of them.
        only: of these, the one shard of this name.
    ``encoding``: how its codes came about (multimodal/pretokenise.py), None where there are images.
    Errors: ``ValueError`` for a folder or split that is not there, ``DamagedShard`` for damage.
    """

    def __init__(
        self, folder: str | Path, split: str | None = None, only: str | None = None
    ) -> None:
        self.folder = Path(folder)
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
        self._samples: list[tuple[int, str, dict[str, list[int]]]] = []
        for number, entry in enumerate(self._entries):
            self._samples += self._open(number, entry)

    def _open(
        self, number: int, entry: dict[str, Any]
    ) -> list[tuple[int, str, dict[str, list[int]]]]:
        path = self.folder / entry["name"]
        if not path.is_file():
            raise DamagedShard(f"{path}: missing, {entry['samples']} samples lost")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedShard(
                f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            )
        index = read_index(path)
        if file_sha256(index_path(path)) != entry["index_sha256"] or len(index) != entry["samples"]:
            raise DamagedShard(f"{index_path(path)}: not the index that the manifest knows")
        return [(number, sample["key"], sample["members"]) for sample in index]

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        return self._samples[i][1]

    def __getitem__(self, i: int) -> Sample:
        number, key, members = self._samples[i]
        entry = self._entries[number]
        path = self.folder / entry["name"]
        if entry["name"] not in self._verified:
            if file_sha256(path) != entry["sha256"]:
                raise DamagedShard(
                    f"{path}: its bytes are not those the manifest knows (SHA-256 differs); "
                    f"run: multimodal data check {self.folder}"
                )
            self._verified.add(entry["name"])
        with open(path, "rb") as file:
            found = {}
            for suffix, (offset, size) in members.items():
                file.seek(offset)
                found[suffix] = file.read(size)
                if len(found[suffix]) != size:
                    raise DamagedShard(f"{path}: cut off inside {key}.{suffix}")
        return Sample(key, found)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def check(folder: str | Path, on_shard: Callable[[str], object] | None = None) -> Iterator[str]:
    """Verify a whole folder; yields one line for each thing that is wrong (none: all is well).

    ``on_shard`` is called with the name of each shard once it has been read, for progress.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    known = {entry["name"] for entry in manifest["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path}: not in the manifest; run: multimodal data index {folder}"
    keys: dict[str, str] = {}
    for entry in manifest["shards"]:
        yield from _check_shard(folder / entry["name"], entry, keys)
        if on_shard is not None:
            on_shard(entry["name"])


def _check_shard(path: Path, entry: dict[str, Any], keys: dict[str, str]) -> Iterator[str]:
    at_stake = f"{entry['samples']} samples at stake"
    if not path.is_file():
        yield f"{path}: missing ({at_stake})"
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        yield f"{path}: {size} bytes, the manifest says {entry['bytes']} ({at_stake})"
    elif file_sha256(path) != entry["sha256"]:
        yield f"{path}: SHA-256 differs from the manifest's ({at_stake})"
    wanted: dict[tuple[str, str], tuple[int, int]] = {}
    try:
        index = read_index(path)
        if file_sha256(index_path(path)) != entry["index_sha256"] or len(index) != entry["samples"]:
            yield f"{index_path(path)}: not the index that the manifest knows"
        for sample in index:
            key = sample["key"]
            if key in keys:
                yield f"{path}: key {key} is also in {keys[key]}: keys must be unique in a folder"
            keys[key] = path.name
            wanted |= {(key, suffix): tuple(place) for suffix, place in sample["members"].items()}
    except DamagedShard as error:
        yield str(error)
    try:
        for key, suffix, *place in _scan(path):
            if suffix.rpartition(".")[2] in PICKLE_SUFFIXES:
                yield f"{path}: member {key}.{suffix} is a pickle: other readers would run it"
            if key.startswith("pipe:"):
                yield f"{path}: member {key}.{suffix} has the form of a shell command's address"
            if wanted.get((key, suffix)) == tuple(place):
                del wanted[key, suffix]
            elif wanted:
                yield f"{path}: member {key}.{suffix} is not where the index says, or not in it"
    except DamagedShard as error:
        yield str(error)
    if lost := sorted({key for key, _ in wanted}):
        more = ", ..." if len(lost) > 20 else ""
        yield f"{path}: lost {len(lost)} samples: {', '.join(lost[:20])}{more}"
