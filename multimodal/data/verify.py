"""Verify every byte of a shard folder, and name what is lost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from multimodal.data.shards import (
    DamagedShard,
    file_sha256,
    index_path,
    read_index,
    read_manifest,
    scan,
)

# Nothing here unpickles, but webdataset's decoder does: these members can run code elsewhere.
PICKLE_SUFFIXES = ("pkl", "pickle", "pyd", "pt", "pth", "joblib")


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
        for key, suffix, *place in scan(path):
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
