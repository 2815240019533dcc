"""Pieces of prompts that were read before: their keys and values, kept for prompts that begin so.

An image with many questions, and the text of a system, are read once. A piece is kept under all
that was read before it, and where that was cut. So a prompt is computed with the same operations
whether its beginning is kept or not, and its numbers are equal in their last bits.

Shapes: L tokens of a piece, G key-value heads, d head size, D width.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from multimodal.model.layers.attention import KVCache

MIN_SHARED = 16  # tokens of a common beginning that are worth a pass of their own


@dataclass(frozen=True, eq=False)
class Piece:
    """What reading a piece of a prompt has given.

    Attributes:
        keys, values: for each layer float[1, G, L, d].
        hidden: float[1, D], the state after its last token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor

    @classmethod
    def last_of(cls, cache: KVCache, tokens: int, hidden: Tensor) -> "Piece":
        """The last tokens of a cache with one row, copied."""
        columns = cache.columns(slice(cache.length - tokens, cache.length))
        keys, values = ([x.clone() for x in several] for several in columns)
        return cls(keys, values, hidden.clone())

    def put_into(self, cache: KVCache) -> None:
        """Let it follow what is in a cache with one row."""
        cache.put(slice(None), cache.length, self.keys, self.values)
        cache.length += self.keys[0].shape[2]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values, self.hidden))


class PrefixCache:
    """Pieces by what they follow. The least recently used ones make room for others.

    Args:
        max_bytes: of all pieces. 0 keeps none.

    Attributes:
        hits, misses: pieces that were looked for.
        tokens_kept, tokens_read: their tokens.
        bytes: of all pieces now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = self.tokens_kept = self.tokens_read = 0
        self._pieces: OrderedDict[Hashable, Piece] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pieces)

    def find(self, key: Hashable, tokens: int) -> Piece | None:
        """A piece of so many tokens, or None if it has to be read."""
        piece = self._pieces.get(key)
        if piece is None:
            self.misses, self.tokens_read = self.misses + 1, self.tokens_read + tokens
            return None
        self.hits, self.tokens_kept = self.hits + 1, self.tokens_kept + tokens
        self._pieces.move_to_end(key)
        return piece

    def add(self, key: Hashable, piece: Piece) -> None:
        if piece.bytes > self.max_bytes or key in self._pieces:
            return
        self._pieces[key] = piece
        self.bytes += piece.bytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._pieces.popitem(last=False)[1].bytes


def key_after(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a piece after the key of what is before it."""
    return hashlib.sha256(before + array("q", ids).tobytes()).digest()
