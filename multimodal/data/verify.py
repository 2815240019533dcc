"""Verify every byte of a shard folder, and name the samples that are lost."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from multimodal.data.members import scan
from multimodal.data.remote.folder import RemoteFolder, local_folder, remote_folder
from multimodal.data.remote.pieces import sha256_at
from multimodal.data.samples import Sample, has_text
from multimodal.data.shards import (
    DamagedShard,
    Shards,
    file_sha256,
    index_path,
    open_index,
    read_manifest,
)

# We never unpickle, but webdataset's decoder does: these members can run code in other readers.
PICKLE_SUFFIXES = ("pkl", "pickle", "pyd", "pt", "pth", "joblib")

NO_TEXT = "samples have no caption, question or label"


def check(folder: str | Path, on_shard: Callable[[str], object] | None = None) -> Iterator[str]:
    """Compare every byte of a shard folder with its manifest and indexes.

    Args:
        folder: a shard folder, or its address: then all of it is downloaded, shard by shard.
        on_shard: is called with the name of each shard after it was read, to show progress.

    Yields:
        One line for each problem. A folder without damage yields nothing.
    """
    try:
        manifest = read_manifest(folder)
        folder = local_folder(folder)
    except ValueError as error:
        yield str(error)
        return
    known = {entry["name"] for entry in manifest["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path}: not in the manifest; run: multimodal data index {folder}"
    keys: dict[str, str] = {}
    for entry in manifest["shards"]:
        if (remote := remote_folder(folder)) is not None:
            yield from _check_remote(remote, entry, keys)
        else:
            yield from _check_shard(folder / entry["name"], entry, keys)
        if on_shard is not None:
            on_shard(entry["name"])


def check_text(sample: Sample, notes: Counter[str]) -> None:
    """Read the record of a sample.

    Args:
        sample: of any kind.
        notes: counts NO_TEXT, and what ``record_of`` notes.

    Raises:
        ValueError: if it cannot be read.
    """
    if not has_text(sample.read_record(lambda what: notes.update([what]))):
        notes[NO_TEXT] += 1


def check_contents(
    folder: str | Path,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = iter,
    notes: Counter[str] | None = None,
) -> Iterator[str]:
    """Decode every image, every array of codes and every record of a shard folder.

    Args:
        folder: a shard folder.
        progress: wraps the samples (``tqdm``, for instance).
        notes: as in ``check_text``.

    Yields:
        One line for each sample that cannot be read.
    """
    from multimodal.data.documents import codes_in, document_of, images_in
    from multimodal.data.images import open_image

    shards = Shards(folder)
    for sample in progress(shards):
        try:
            if shards.encoding is not None:
                codes_in(sample)
            else:
                for data in images_in(sample):
                    open_image(data, name=f"sample {sample.key}")
            document_of(sample)
            check_text(sample, Counter() if notes is None else notes)
        except ValueError as error:
            yield f"{folder}: {error}"


def _check_remote(
    remote: RemoteFolder, entry: dict[str, Any], keys: dict[str, str]
) -> Iterator[str]:
    """Check a copy of one shard, which is not kept."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / entry["name"]
        try:
            for file in (path, index_path(path)):
                remote.transport.download(file.name, file)
        except ValueError as error:
            yield str(error)
            return
        for problem in _check_shard(path, entry, keys):
            yield problem.replace(name, remote.address)


def _check_shard(path: Path, entry: dict[str, Any], keys: dict[str, str]) -> Iterator[str]:
    at_risk = f"{entry['samples']} samples at stake"
    if not path.is_file():
        yield f"{path}: missing ({at_risk})"
        return
    size, problem = path.stat().st_size, ""
    if size != entry["bytes"]:
        problem = f"{path}: {size} bytes, the manifest says {entry['bytes']} ({at_risk})"
    elif file_sha256(path) != entry["sha256"]:
        problem = f"{path}: SHA-256 differs from the manifest's ({at_risk})"
    if problem:
        yield problem
    expected: dict[tuple[str, str], tuple[int, int]] = {}
    try:
        samples, pieces = open_index(path)
        known = file_sha256(index_path(path)) == entry["index_sha256"]
        if not known or len(samples) != entry["samples"]:
            yield f"{index_path(path)}: not the index that the manifest knows"
        elif not problem and any(sha256_at(path, p.start, p.stop) != p.sha256 for p in pieces):
            yield f"{path}: differs from the hashes of its pieces in the index ({at_risk})"
        for sample in samples:
            key = sample["key"]
            if key in keys:
                yield f"{path}: key {key} is also in {keys[key]}: keys must be unique in a folder"
            keys[key] = path.name
            expected |= {(key, suffix): tuple(place) for suffix, place in sample["members"].items()}
    except DamagedShard as error:
        yield str(error)
    try:
        for key, suffix, *place in scan(path):
            if suffix.rpartition(".")[2] in PICKLE_SUFFIXES:
                yield f"{path}: member {key}.{suffix} is a pickle: other readers would run it"
            if key.startswith("pipe:"):
                yield f"{path}: member {key}.{suffix} has the form of a shell command's address"
            if expected.get((key, suffix)) == tuple(place):
                del expected[key, suffix]
            elif expected:
                yield f"{path}: member {key}.{suffix} is not where the index says, or not in it"
    except DamagedShard as error:
        yield str(error)
    if lost := sorted({key for key, _ in expected}):
        more = ", ..." if len(lost) > 20 else ""
        yield f"{path}: lost {len(lost)} samples: {', '.join(lost[:20])}{more}"
