"""A shard folder at any address that fsspec reads (``s3://``, ``gs://``, ``https://``, ...).

A remote folder has a mirror: a local folder with a fresh copy of its manifest. Indexes and pieces
of shards are in one cache for all folders (``cache.py``). Both are in ``$MULTIMODAL_CACHE`` or
``~/.cache/multimodal``, and may be deleted at any time. ``$MULTIMODAL_CACHE_BYTES`` limits the
cache.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from multimodal.data.remote.ahead import AHEAD, READERS
from multimodal.data.remote.cache import Cache, Entry
from multimodal.data.remote.pieces import Piece
from multimodal.data.remote.transport import NoRanges, Transport
from multimodal.files import address_of, atomic_file

MANIFEST = "manifest.json"
ADDRESS = ".address"  # the file of a mirror that holds its address
LIMIT = "MULTIMODAL_CACHE_BYTES"


def local_folder(folder: str | Path) -> Path:
    """The folder, or the mirror of an address with a fresh copy of its manifest.

    Raises:
        ValueError: if the manifest cannot be read at the address.
    """
    address = (address_of(folder) or "").rstrip("/")
    if not address:
        return Path(folder)
    mirror = cache_folder() / "folders" / hashlib.sha256(address.encode()).hexdigest()[:16]
    mirror.mkdir(parents=True, exist_ok=True)
    if not (mirror / ADDRESS).is_file():
        with atomic_file(mirror / ADDRESS, shared=True) as part:
            part.write_text(address, "utf-8")
    # A wrong address has to be told at once: no long waiting for a server to return.
    manifest = _opened(mirror, os.getpid()).transport.read(MANIFEST, retry_seconds=0)
    with atomic_file(mirror / MANIFEST, shared=True) as part:
        part.write_bytes(manifest)
    return mirror


def remote_folder(folder: Path) -> "RemoteFolder | None":
    """What reads the shards of a mirror that ``local_folder`` made. None for any other folder."""
    if folder.parent != cache_folder() / "folders" or not (folder / ADDRESS).is_file():
        return None
    return _opened(folder, os.getpid())


def cache_folder() -> Path:
    """Where this machine keeps what it can download or make again."""
    return Path(os.environ.get("MULTIMODAL_CACHE", "~/.cache/multimodal")).expanduser()


@lru_cache
def _opened(mirror: Path, process: int) -> "RemoteFolder":
    """One for all readers of a process: a fork must not share connections."""
    cache = _cache(cache_folder() / "shards", os.environ.get(LIMIT, ""), process)
    return RemoteFolder((mirror / ADDRESS).read_text("utf-8"), cache)


@lru_cache
def _cache(folder: Path, limit: str, process: int) -> Cache:
    if limit and not limit.isdecimal():
        raise ValueError(f"{LIMIT}={limit}: expected a number of bytes")
    return Cache(folder, int(limit) if limit else None)


class RemoteFolder:
    """Reads indexes and pieces of the shards at one address, each verified by its SHA-256.

    ``shard`` is the entry of a shard in the manifest, ``pieces`` are those in its index. Without
    pieces, or if the server only sends whole files, the whole shard is one piece.

    Args:
        address: without a slash at the end.
        cache: holds what was read.
    """

    def __init__(self, address: str, cache: Cache) -> None:
        self.address, self.cache = address, cache
        self.transport = Transport(address)
        self._ranges = True  # until the server shows that it ignores them
        self._announced: set[str] = set()
        self._index_locks: dict[str, threading.Lock] = {}

    def read_index(self, name: str, sha256: str) -> bytes:
        """The bytes of an index file. Errors as in ``read``."""
        # The length of the file is not known, so its entry cannot be reserved before it is read.
        with self._index_locks.setdefault(sha256, threading.Lock()):
            if (found := self.cache.find(sha256)) is not None:
                try:
                    return found.read(0, os.fstat(found.descriptor).st_size)
                finally:
                    os.close(found.descriptor)
            data = self.transport.read(name, sha256=sha256)
            with self.cache.open(sha256, len(data)) as entry:
                if not entry.complete:
                    entry.write(data)
                    self.cache.publish(entry)
            return data

    def read(
        self, shard: Mapping[str, Any], pieces: Sequence[Piece], start: int, stop: int
    ) -> bytes:
        """Bytes [start, stop) of a shard, which lie in one piece.

        Raises:
            ValueError: if they cannot be read, or if there is no such piece.
            DamagedShard: if they differ from their checksum.
        """
        while True:
            piece = self._piece(shard, pieces, start, stop)
            try:
                with self.cache.open(piece.sha256, piece.size) as entry:
                    if not entry.complete:
                        self._fill(entry, shard, piece)
                    return entry.read(start - piece.start, stop - piece.start)
            except NoRanges:
                self._ranges = False

    def announce(
        self, shard: Mapping[str, Any], pieces: Sequence[Piece], start: int, stop: int
    ) -> None:
        """Begin to bring the piece of these bytes into the cache. Returns at once."""
        piece = self._piece(shard, pieces, start, stop)
        # What is read in advance must not push out what was read in advance before.
        if piece.size * AHEAD > self.cache.limit or piece.sha256 in self._announced:
            return
        if not self.cache.has(piece.sha256):
            self._announced.add(piece.sha256)
            READERS.submit(partial(self._bring, shard, piece))

    def _bring(self, shard: Mapping[str, Any], piece: Piece) -> None:
        try:
            with self.cache.open(piece.sha256, piece.size) as entry:
                if not entry.complete:
                    self._fill(entry, shard, piece)
        finally:
            self._announced.discard(piece.sha256)

    def _fill(self, entry: Entry, shard: Mapping[str, Any], piece: Piece) -> None:
        """Write the bytes of a piece into its entry."""
        if piece.size == shard["bytes"]:
            self.transport.download(shard["name"], entry.path, piece.size, piece.sha256)
        else:
            where = piece.start, piece.stop
            entry.write(self.transport.read(shard["name"], *where, sha256=piece.sha256))
        self.cache.publish(entry)

    def _piece(
        self, shard: Mapping[str, Any], pieces: Sequence[Piece], start: int, stop: int
    ) -> Piece:
        if not (pieces and self._ranges):
            return Piece(0, shard["bytes"], shard["sha256"])
        piece = pieces[bisect_right(pieces, start, key=lambda each: each.start) - 1]
        if not piece.start <= start <= stop <= piece.stop:
            raise ValueError(
                f"{self.address}/{shard['name']}: its index has no piece with bytes {start:,} to "
                f"{stop:,}; run there: multimodal data index"
            )
        return piece
