"""Pieces: the parts of a shard that are read at once, each with its SHA-256.

The manifest knows only the hash of a whole shard, which says nothing about a part of it. So the
index of a shard also lists its pieces. A sample lies in one piece, and neighbouring samples share a
piece until it has PIECE bytes.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multimodal.files import open_file

_HEX = frozenset("0123456789abcdef")
PIECE = 1 << 18  # bytes at least, but for the last piece: one request of a remote folder


class DamagedShard(ValueError):
    """A shard differs from its manifest or index."""


class Piece(NamedTuple):
    """Bytes [start, stop) of a shard, and the SHA-256 of them."""

    start: int
    stop: int
    sha256: str

    @property
    def size(self) -> int:
        return self.stop - self.start


def pieces_of(shard: Path, samples: Iterable[Iterable[Sequence[int]]]) -> list[Piece]:
    """Divide a shard into pieces.

    Args:
        shard: a local tar.
        samples: (offset, size) of each member of each sample, in the order of the tar.
    """
    spans: list[tuple[int, int]] = []
    for places in map(list, samples):
        start = min(offset for offset, _ in places)
        stop = max(offset + size for offset, size in places)
        if spans and spans[-1][1] - spans[-1][0] < PIECE:
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
    return [Piece(*span, sha256_at(shard, *span)) for span in spans]


def sha256_at(path: Path, start: int, stop: int) -> str:
    """The SHA-256 of bytes [start, stop) of a file."""
    with open_file(path) as file:
        file.seek(start)
        return hashlib.sha256(file.read(stop - start)).hexdigest()


def parse_pieces(stored: Any, size: int | None) -> list[Piece]:
    """The pieces in an index, sorted. An empty list: the index was written without.

    Args:
        stored: ``[[start, stop, sha256], ...]`` or None.
        size: bytes of the shard. None: not known.

    Raises:
        ValueError: if they are not valid.
    """
    pieces = [Piece(*each) for each in stored or ()]
    end, size = 0, 1 << 62 if size is None else size
    for start, stop, sha256 in pieces:
        if type(start) is not int or type(stop) is not int or not end <= start <= stop <= size:
            raise ValueError(f"a piece from {start} to {stop} is not in order")
        check_digest(sha256)
        end = stop
    return pieces


def check_digest(sha256: object) -> str:
    """A SHA-256 as 64 hex digits: it becomes the name of a file.

    Raises:
        ValueError: for anything else.
    """
    if not (isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= _HEX):
        raise ValueError(f"{str(sha256)[:80]!r} is not a SHA-256")
    return sha256


def span_of(members: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """The bytes of a shard from the first member of a sample to the last."""
    places = members.values()
    return min(offset for offset, _ in places), max(offset + size for offset, size in places)
