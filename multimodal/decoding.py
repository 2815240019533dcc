"""The transformer's forward after a cache, of one token of each row: the same numbers, sooner.

On a CPU a step of a small model is mostly the calling of operations, and here are as few of them
as it takes: no rearranging of one token, no keys and values repeated for the heads of a group.
Compiled, a step (of one token, or of the codes of a drawing) is a handful of kernels, on a GPU a
CUDA graph; that takes ten to twenty seconds first, and shapes that stay the same: the whole cache,
with a mask over what is not filled.

Shapes: B rows, S tokens in the cache, D width, H heads, G key-value heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.transformer import Cache, Layer, Transformer, norm_in_fp32, rope, rotate

Step: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor], Tensor]
ROOM_MULTIPLE = 128  # tokens in the cache of a compiled step: a new shape is compiled anew
COMPILED_ROWS = 2  # on a CPU: one, or a drawing and its guidance; for many it is slower


def product(x: Tensor, linear: nn.Module) -> Tensor:
    """float[B, D] times weight: float[N, D] of a layer without bias -> float[B, N]

    Compiled for a CPU it is written as a sum. Of a few rows the product waits for its weights
    alone, and the loop that the compiler makes of this reads them three times as fast as the
    matrix product of a library (docs/decisions.md).
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if torch.compiler.is_compiling() and not x.is_cuda:
        return (x[:, None].float() * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)


def read_token(
    transformer: Transformer,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
) -> Tensor:
    """ids: int64[B]; positions: int64[B, 1]; mask: bool[B, 1, 1, S] or None, which sees all; keys,
    values: float[layers, B, G, S, d]; place: int64[1], where in them the token goes
    -> float[B, D], normed"""
    cos, sin = (angles[:, 0] for angles in rope(positions, transformer.config))  # [B, 1, d]
    x: Tensor = transformer.embed_tokens(ids)
    for number, layer in enumerate(transformer.layers):
        assert isinstance(layer, Layer)
        own, read = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            product(read, projection).view(len(ids), -1, own.head_dim)
            for projection in (own.q_proj, own.k_proj, own.v_proj)
        )
        q, k = (
            rotate(norm_in_fp32(norm, part), cos, sin).to(v.dtype)
            for norm, part in ((own.q_norm, q), (own.k_norm, k))
        )
        # Under autocast the cache is wider than what goes into it.
        keys[number].index_copy_(2, place, k[:, :, None].to(keys.dtype))
        values[number].index_copy_(2, place, v[:, :, None].to(keys.dtype))
        # The heads of a group stand where queries do: [B, G, H / G, d].
        grouped = q.reshape(len(q), keys.shape[2], -1, own.head_dim)
        seen = F.scaled_dot_product_attention(grouped, keys[number], values[number], attn_mask=mask)
        x = x + product(seen.flatten(1), own.o_proj)
        read, mlp = layer.post_attention_layernorm(x), layer.mlp
        gated = F.silu(product(read, mlp.gate_proj)) * product(read, mlp.up_proj)
        x = x + product(gated, mlp.down_proj)
    out: Tensor = transformer.norm(x)
    return out


@dataclass(frozen=True)
class Compiled:
    """Compiled when first called, and for each new shape.

    step: ``read_token``; forward: the transformer's, of a block (``Batch.read_block``)
    """

    step: Step
    forward: Callable[[Tensor, Tensor, Tensor, Cache, slice], Tensor]

    @classmethod
    def of(cls, transformer: Transformer) -> "Compiled":
        graphs = transformer.embed_tokens.weight.is_cuda
        mode = "reduce-overhead" if graphs else "default"
        step, forward = (
            torch.compile(function, dynamic=False, mode=mode)
            for function in (partial(read_token, transformer), transformer.forward)
        )
        return cls(step, forward)
