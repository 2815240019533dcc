"""Write samples to the numbered shards of each split."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from multimodal.data.builder.image_parts import ImageFile
from multimodal.data.samples import plain
from multimodal.data.shards import index_shard
from multimodal.data.tables.records import RejectedSample, SourceSample

_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


def is_held_out(key: str, share: float) -> bool:
    """Whether a sample belongs to the split ``val``. Depends on its key and the share only."""
    number = int.from_bytes(hashlib.sha256(f"split/{key}".encode()).digest()[:8], "big")
    return number < share * 2**64


def make_key(hint: str, identity: str, taken: set[str]) -> str:
    """Make a key without dots and slashes.

    Args:
        hint: is the key if it is a valid key and free. Otherwise a part of it starts the key.
        identity: its hash makes the key unique.
        taken: keys that are in use.
    """
    if _SAFE_KEY.fullmatch(hint) and hint not in taken:
        return hint
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", hint)[-60:].strip("_-") or "image"
    return f"{readable}_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def member_name(sample: SourceSample, number: int, image: ImageFile) -> str:
    """The suffix of an image in the shard: ``jpg``, or ``0.jpg``, ``1.jpg`` ... in a document."""
    return f"{number}.{image.suffix}" if sample.document else image.suffix


class ShardWriter:
    """Writes samples to numbered shards of each split, and indexes each shard when it is full.

    Attributes:
        entries: of the finished shards, for the manifest.
        splits: number of samples of each split.
    """

    def __init__(self, folder: Path, shard_size: int, val_share: float) -> None:
        self.entries: list[dict[str, Any]] = []
        self.splits: Counter[str] = Counter()
        self._folder, self._shard_size, self._val_share = folder, shard_size, val_share
        self._keys: set[str] = set()
        self._open: dict[str, tuple[Path, BinaryIO, Any]] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for split in list(self._open):
            self._close(split, index=kind is None)

    def write(self, sample: SourceSample, images: list[ImageFile]) -> RejectedSample | None:
        """Write one sample. Returns None, or the reason why it cannot be written."""
        try:
            record = json.dumps(
                plain(sample.record), ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode("utf-8")
        except ValueError as error:  # a number of thousands of digits
            return sample.rejected("unreadable text", str(error))
        key = make_key(sample.hint, sample.identity, self._keys)
        if key in self._keys:
            return sample.rejected("key taken", f"another sample has the key {key}")
        self._keys.add(key)
        split = sample.split or ("val" if is_held_out(key, self._val_share) else "train")
        if self.splits[split] % self._shard_size == 0:
            self._next(split)
        members = {
            member_name(sample, number, image): image.data for number, image in enumerate(images)
        }
        self._open[split][2].write({"__key__": key, **members, "json": record})
        self.splits[split] += 1
        return None

    def _next(self, split: str) -> None:
        import webdataset  # slow to import: it brings torch

        if split in self._open:
            self._close(split)
        path = self._folder / f"{split}-{self.splits[split] // self._shard_size:04d}.tar"
        file = open(path, "wb")
        # By default webdataset writes the current time, and encodes members again.
        self._open[split] = path, file, webdataset.TarWriter(file, mtime=0, encoder=False)

    def _close(self, split: str, index: bool = True) -> None:
        path, file, writer = self._open.pop(split)
        with file:
            writer.close()
        if index:
            self.entries.append(index_shard(path))
