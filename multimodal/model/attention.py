"""One rule of attention for everything.

A query may see a key if they are in the same document and the key is not later, or both are in the
same bidirectional block. With documents 1 1 1 1 1 2 2 and the block  . . b b . . . :

    query 0   1 . . . . . .        <bos>
    query 1   1 1 . . . . .        <boi>
    query 2   1 1 1 1 . . .        code: sees all of its block
    query 3   1 1 1 1 . . .        code
    query 4   1 1 1 1 1 . .        what follows the block
    query 5   . . . . . 1 .        the next document
    query 6   . . . . . 1 1

Two backends hold it, equal in values and gradients: SDPA with a boolean mask, which runs anywhere
and is the reference, and FlexAttention (Dong et al. 2024, arXiv:2412.05496), which on a GPU skips
what the rule forbids instead of computing it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["sdpa", "flex"]
Mask: TypeAlias = "Tensor | BlockMask | None"


def attention_mask(documents: Tensor, blocks: Tensor) -> Tensor:
    """documents, blocks: int64[B, L]; block 0 is causal -> bool[B, 1, L, L], True where q sees k"""
    length = documents.shape[1]
    same_document = documents[:, :, None] == documents[:, None, :]
    not_later = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    same_block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] > 0)
    return (same_document & (not_later | same_block))[:, None]


def block_mask(documents: Tensor, blocks: Tensor) -> "BlockMask":
    """The same rule, for FlexAttention; documents, blocks: int64[B, L]"""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = documents[b, query] == documents[b, key]
        same_block = (blocks[b, query] == blocks[b, key]) & (blocks[b, query] > 0)
        return same_document & ((key <= query) | same_block)

    rows, length = documents.shape
    return create_block_mask(sees, rows, None, length, length, device=documents.device.type)


@lru_cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Any = flex_attention
    found: Callable[..., Any] = torch.compile(plain) if compiled else plain
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q: float[B, H, L, d]; k, v: float[B, G, S, d], H a multiple of G; mask: bool[B, 1, L, S], or
    what ``block_mask`` makes

    A mask of None lets every query see every key.
    """
    groups = q.shape[1] // k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        out: Tensor = _flex(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=groups > 1)
        return out
    if q.is_cpu and q.requires_grad:
        return _attend_written_out(q, k, v, mask, groups)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int
) -> Tensor:
    """The same, written out: training on a CPU is 1.2 to 2 times faster so, for rows of 128 to 512.

    torch's kernel for a CPU takes most of its time going back (benchmarks/cpu_training.py).
    """
    q = rearrange(q * q.shape[-1] ** -0.5, "b (g r) l d -> b g (r l) d", r=groups)
    scores = rearrange(q @ k.transpose(-1, -2), "b g (r l) s -> b g r l s", r=groups)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = rearrange(scores.softmax(-1).to(v.dtype), "b g r l s -> b g (r l) s")
    return rearrange(weights @ v, "b g (r l) d -> b (g r) l d", r=groups)
