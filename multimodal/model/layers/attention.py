"""One rule of attention for everything, and the cache of keys and values.

A query may see a key if they are in the same document, the key is in the trunk (branch 0) or in the
query's own branch, and the key is not later or both are in the same bidirectional block.

With documents 1 1 1 1 1 2 2 and the block  . . b b . . . , all of them trunks:

    query 0   1 . . . . . .        <bos>
    query 1   1 1 . . . . .        <boi>
    query 2   1 1 1 1 . . .        code: sees all of its block
    query 3   1 1 1 1 . . .        code
    query 4   1 1 1 1 1 . .        what follows the block
    query 5   . . . . . 1 .        the next document
    query 6   . . . . . 1 1

With one document and the branches 0 0 0 1 1 2 2:

    query 0   1 . . . . . .        <bos>
    query 1   1 1 . . . . .        <boi>
    query 2   1 1 1 . . . .        code: the trunk ends
    query 3   1 1 1 1 . . .        the first caption
    query 4   1 1 1 1 1 . .
    query 5   1 1 1 . . 1 .        the second caption sees the image, and not the first caption
    query 6   1 1 1 . . 1 1

Two backends compute it, with equal values and gradients. SDPA with a boolean mask runs anywhere and
is the reference. FlexAttention (Dong et al. 2024, arXiv:2412.05496) skips masked blocks on a GPU
instead of computing them.

Shapes: B rows, L queries, S keys, H heads, G key-value heads, d head size.
"""

from collections.abc import Callable, Sequence
from contextlib import _GeneratorContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.devices import SharedSetting

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["sdpa", "flex"]
Mask: TypeAlias = "Tensor | BlockMask | None"
QKNorm = Literal["none", "rms", "layer"]


def attention_mask(documents: Tensor, blocks: Tensor, branches: Tensor | None = None) -> Tensor:
    """The rule as a boolean mask.

    Args:
        documents: int64[B, L], the document of each token.
        blocks: int64[B, L], its bidirectional block. 0 is none: causal.
        branches: int64[B, L], its branch. 0 is the trunk, and None: there are only trunks.

    Returns:
        bool[B, 1, L, L], True where a query sees a key.
    """
    length = documents.shape[1]
    same_document = documents[:, :, None] == documents[:, None, :]
    not_later = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    same_block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] > 0)
    sees = same_document & (not_later | same_block)
    if branches is not None:
        same_branch = branches[:, :, None] == branches[:, None, :]
        sees &= same_branch | (branches[:, None, :] == 0)
    return sees[:, None]


def visible(positions: Tensor, columns: int) -> Tensor:
    """bool[B, 1, 1, columns]: what single tokens at positions of a cache see.

    positions: int64[B, 1].
    """
    return (torch.arange(columns, device=positions.device) <= positions)[:, None, None]


def block_mask(documents: Tensor, blocks: Tensor, branches: Tensor) -> "BlockMask":
    """The same rule for FlexAttention. Arguments as for ``attention_mask``."""

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = documents[b, query] == documents[b, key]
        same_block = (blocks[b, query] == blocks[b, key]) & (blocks[b, query] > 0)
        same_branch = (branches[b, query] == branches[b, key]) | (branches[b, key] == 0)
        return same_document & same_branch & ((key <= query) | same_block)

    rows, length = documents.shape
    make = _create_block_mask(documents.is_cuda)
    return make(sees, rows, None, length, length, device=documents.device.type)


@lru_cache
def _create_block_mask(compiled: bool) -> "Callable[..., BlockMask]":
    from torch.nn.attention.flex_attention import create_block_mask

    # Not compiled it would write the whole mask to memory.
    return torch.compile(create_block_mask) if compiled else create_block_mask


@lru_cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return torch.compile(plain) if compiled else plain


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Scaled dot-product attention, grouped-query where G < H.

    Args:
        q: float[B, H, L, d].
        k, v: float[B, G, S, d]. H is a multiple of G.
        mask: bool[B, 1, L, S], or a mask of ``block_mask``. None: every query sees every key.

    Returns:
        float[B, H, L, d].
    """
    groups = q.shape[1] // k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        return _flex(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=groups > 1)
    if q.is_cpu and q.requires_grad:
        return _attend_by_products(q, k, v, mask, groups)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def without_cudnn_attention() -> "_GeneratorContextManager[None]":
    """Leave cuDNN's attention out, for lengths that grow by one token a step.

    In fp16 and bf16 torch takes cuDNN, which plans once for each new length: 50 ms on an H200, for
    a step that takes 2 ms (docs/decisions/decoding_speed.md). The setting is one of the process:
    see ``SharedSetting``. Nothing changes on a CPU.
    """
    return _without_cudnn.held()


def _leave_cudnn_out() -> bool:
    before = bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return before


_without_cudnn = SharedSetting(
    _leave_cudnn_out, lambda on: torch.backends.cuda.enable_cudnn_sdp(on)
)


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int
) -> Tensor:
    """The same as plain products. torch's CPU kernel is slow in the backward pass.

    Training on a CPU is 1.2 to 2 times faster for rows of 128 to 512 (benchmarks/cpu_training.py).
    """
    q = rearrange(q * q.shape[-1] ** -0.5, "b (g r) l d -> b g (r l) d", r=groups)
    scores = rearrange(q @ k.transpose(-1, -2), "b g (r l) s -> b g r l s", r=groups)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = rearrange(scores.softmax(-1).to(v.dtype), "b g r l s -> b g (r l) s")
    return rearrange(weights @ v, "b g (r l) d -> b (g r) l d", r=groups)


def attend_exactly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token of each row, of which no bit depends on the other rows.

    torch's CPU kernel gives each thread a buffer, and where that lies decides how its products add.

    Args:
        q: float[B, G, r, d], the r query heads of each of G key-value heads.
        k, v: float[B, G, S, d]. For equal bits S is a multiple of 16 (a vector of a CPU).
        mask: bool[B, 1, 1, S].

    Returns:
        float[B, G, r, d].
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of each head in fp32, one weight for all: float[..., H, d] -> float32[..., H, d]."""

    def forward(self, x: Tensor) -> Tensor:
        # One dtype throughout gets torch's fused kernel.
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class HeadLayerNorm(nn.Module):
    """LayerNorm of each head in fp32, with a weight and a bias of its own (Chameleon,
    arXiv:2405.09818): float[..., H, d] -> float32[..., H, d].

    They are vectors, float[H d], so that an optimizer of matrices leaves them alone.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-5)
        weight, bias = (part.float().view(x.shape[-2:]) for part in (self.weight, self.bias))
        return torch.addcmul(bias, normed, weight)


class InFP32(nn.Module):
    """No norm: the numbers in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def head_norm(kind: QKNorm, heads: int, head_dim: int, eps: float) -> nn.Module:
    """The norm of queries or keys, float[..., H, d] -> float32[..., H, d].

    Args:
        kind: ``rms`` (Qwen3), ``layer`` (Chameleon) or ``none`` (Llama).
        heads, head_dim: H, d.
        eps: of ``rms``.

    Raises:
        ValueError: for another kind.
    """
    if kind == "rms":
        return HeadRMSNorm(head_dim, eps)
    if kind == "layer":
        return HeadLayerNorm(heads, head_dim)
    if kind != "none":
        raise ValueError(f"qk_norm={kind!r}: expected one of {', '.join(get_args(QKNorm))}")
    return InFP32()


@dataclass
class KVCache:
    """Keys and values of the tokens that were read so far.

    Every layer has tensors of its own: a compiled step would copy a larger tensor whole when it
    writes to a part of it.

    Attributes:
        keys, values: for each layer float[B, G, S, d]. S is the capacity.
        length: how many of the S tokens are filled.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    def __post_init__(self) -> None:
        self._whole = self.keys, self.values  # of these, the rows in use are views

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor
    ) -> "KVCache":
        """Zeros on the device of ``like``; heads: of keys and values.

        They have the dtype of ``like``. Under autocast they have that of the products: a wider
        cache would be converted whole at every step.
        """
        device, shape = like.device, (rows, heads, capacity, head_dim)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else like.dtype
        keys, values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            for _ in range(2)
        )
        return cls(keys, values)

    @property
    def capacity(self) -> int:
        """How many tokens it can hold."""
        return self.keys[0].shape[2]

    @property
    def address(self) -> int:
        """Where its memory is."""
        return self._whole[0][0].data_ptr()

    @property
    def most_rows(self) -> int:
        """How many rows there is memory for."""
        return len(self._whole[0][0])

    def set_rows(self, rows: int) -> bool:
        """Use so many rows, the first ones, if there is memory for them. Those added hold anything.

        Returns:
            Whether there is.
        """
        if rows > self.most_rows:
            return False
        self.keys, self.values = ([x[:rows] for x in each] for each in self._whole)
        return True

    def row(self, number: int) -> "KVCache":
        """One row, in the same memory, with a length of its own."""
        keys, values = ([x[number : number + 1] for x in each] for each in (self.keys, self.values))
        return KVCache(keys, values)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens of one layer. ``length`` stays until all layers are done.

        Args:
            k, v: float[B, G, L, d].

        Returns:
            Keys and values of all tokens of the layer, float[B, G, length + L, d].
        """
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"the cache has room for {self.capacity} tokens"
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def columns(self, columns: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the keys and values of some tokens."""
        keys, values = ([x[:, :, columns] for x in several] for several in (self.keys, self.values))
        return keys, values

    def put(self, rows: slice, start: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Copy keys and values, for each layer float[B, G, L, d], to these rows from a token on."""
        for stored, new in ((self.keys, keys), (self.values, values)):
            for x, y in zip(stored, new, strict=True):
                x[rows, :, start : start + y.shape[2]] = y

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order. A row may be given several times.

        Rows that stay in place cost nothing. The memory of dropped rows is kept for others.

        Args:
            rows: int64[B'].
        """
        count = len(rows)
        if count > len(self.keys[0]):
            self.keys, self.values = ([x[rows] for x in each] for each in (self.keys, self.values))
            self._whole = self.keys, self.values
            return
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        if len(moved):
            sources = rows[moved]
            for x in (*self.keys, *self.values):
                x[moved, :, : self.length] = x[sources, :, : self.length]
        self.set_rows(count)

    def shift(self, start: int, by: Sequence[int]) -> None:
        """Move the tokens of each row to the left, from a column on, by a number for each row."""
        columns = torch.arange(start, self.length, device=self.keys[0].device)
        index = columns + torch.tensor(by, device=columns.device)[:, None]
        index = index.clamp(max=self.length - 1)[:, None, :, None]
        for x in (*self.keys, *self.values):
            moved = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            x[:, :, start : self.length] = moved

    def grow(self, tokens: int) -> None:
        """Make room for more tokens."""
        self.keys, self.values = (
            [F.pad(x, (0, 0, 0, tokens)) for x in several] for several in (self.keys, self.values)
        )
        self._whole = self.keys, self.values
