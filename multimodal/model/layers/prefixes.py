"""Pieces of prompts that were read before: their keys and values, kept for prompts that begin so.

An image with many questions, and the text of a system, are read once. A piece is kept under all
that was read before it, and where that was cut. So a prompt is computed with the same operations
whether its beginning is kept or not, and its numbers are equal in their last bits.

Shapes: L tokens of a piece, G key-value heads, d head size, D width.
"""

import hashlib
import math
import mmap
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.model.layers.attention import KVCache

MIN_SHARED = 16  # tokens of a common beginning that are worth a pass of their own
ALIGNMENT = 64  # bytes at which each tensor begins


class Apart:
    """Copies of tensors of one device, for what is kept for long, in one piece of memory.

    On a CPU it does not come from malloc, nor do tensors stay. What lies there between activations,
    which come and go, breaks their memory into pieces, be it as small as the head of a tensor: the
    process grew to ten times of what it needed (docs/decisions/decoding_speed.md). The system gets
    this memory back when it is freed.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [(x.dtype, tuple(x.shape)) for x in tensors]
        self._sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors]
        self.bytes, device = sum(self._sizes), tensors[0].device
        self._memory: mmap.mmap | Tensor
        if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE"):
            self._memory = mmap.mmap(-1, self.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        for copy, x in zip(self.tensors(), tensors, strict=True):
            copy.copy_(x)

    def tensors(self) -> list[Tensor]:
        """In this memory."""
        whole = self._memory
        if not isinstance(whole, Tensor):
            whole = torch.frombuffer(whole, dtype=torch.uint8)
        parts = zip(torch.split(whole, self._sizes), self._kinds, strict=True)
        return [
            part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for part, (dtype, shape) in parts
        ]


@dataclass(frozen=True, eq=False)
class Piece:
    """What reading a piece of a prompt has given.

    Attributes:
        tokens: L.
        kept: keys and values of each layer, float[1, G, L, d], and the state after the last token,
            float[1, D].
    """

    tokens: int
    kept: Apart

    @classmethod
    def last_of(cls, cache: KVCache, tokens: int, hidden: Tensor) -> "Piece":
        """The last tokens of a cache with one row, copied."""
        keys, values = cache.columns(slice(cache.length - tokens, cache.length))
        return cls(tokens, Apart([*keys, *values, hidden]))

    def put_into(self, cache: KVCache) -> Tensor:
        """Let it follow what is in a cache with one row: the state after it, float[1, D]."""
        *both, hidden = self.kept.tensors()
        layers = len(both) // 2
        cache.put(slice(None), cache.length, both[:layers], both[layers:])
        cache.length += self.tokens
        return hidden

    @property
    def bytes(self) -> int:
        return self.kept.bytes


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
