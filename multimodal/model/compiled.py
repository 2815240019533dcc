"""The transformer's forward after a cache, of one token of each row: the same numbers, sooner.

On a CPU a step of a small model is mostly the calling of operations, and here are as few of them
as it takes: no rearranging of one token, no keys and values repeated for the heads of a group.
Compiled, a step is a handful of kernels: for few rows, of shapes that stay the same (the whole
cache, with a mask over what is not filled), on a GPU a CUDA graph; for many rows, for prompts and
for the codes of a drawing, of any shape. Each form of each takes ten to thirty seconds at first.

Shapes: B rows, S tokens in the cache, D width, H heads, G key-value heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.model.transformer import Cache, Layer, Transformer, norm_in_fp32, rope, rotate

Step: TypeAlias = Callable[
    [Tensor, Tensor, Tensor | None, list[Tensor], list[Tensor], Tensor], Tensor
]
ROOM_MULTIPLE = 128  # tokens in the cache of a compiled step: a new shape is compiled anew
FEW = 2  # rows: one, or a drawing and its guidance
FORMS = 64  # compiled of one function at most: torch's own limit, 8, ends at 512 tokens of FEW rows


def product(x: Tensor, linear: nn.Module) -> Tensor:
    """float[B, D] times weight: float[N, D] of a layer without bias -> float[B, N]

    Compiled for a few rows on a CPU it is written as a sum: there the product waits for its weights
    alone, and the loop that the compiler makes of this reads them three times as fast as the
    matrix product of a library (docs/decisions/decoding_speed.md).
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if torch.compiler.is_compiling() and not x.is_cuda and len(x) <= FEW:
        return (x[:, None].float() * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)


def read_token(
    transformer: Transformer,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    place: Tensor,
) -> Tensor:
    """ids: int64[B]; positions: int64[B, 1]; mask: bool[B, 1, 1, S] or None, which sees all; keys,
    values: of each layer float[B, G, S, d]; place: int64[1], where in them the token goes
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
        keys[number].index_copy_(2, place, k[:, :, None].to(keys[number].dtype))
        values[number].index_copy_(2, place, v[:, :, None].to(keys[number].dtype))
        # The heads of a group stand where queries do: [B, G, H / G, d].
        grouped = q.reshape(len(q), keys[number].shape[1], -1, own.head_dim)
        seen = F.scaled_dot_product_attention(grouped, keys[number], values[number], attn_mask=mask)
        x = x + product(seen.flatten(1), own.o_proj)
        read, mlp = layer.post_attention_layernorm(x), layer.mlp
        gated = F.silu(product(read, mlp.gate_proj)) * product(read, mlp.up_proj)
        x = x + product(gated, mlp.down_proj)
    out: Tensor = transformer.norm(x)
    return out


def read_prompt(
    transformer: Transformer, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache
) -> Tensor:
    """ids, positions: int64[B, L]; mask: bool[B, 1, L, S] -> float[B, D] of the last tokens; all of
    them are in the cache then"""
    states: Tensor = transformer(ids, positions, mask, cache, slice(-1, None))
    return states[:, 0]


@dataclass(frozen=True)
class Compiled:
    """Compiled when first called: ``step`` for each shape, on a GPU as a CUDA graph, the others for
    any shape.

    step: ``read_token`` of up to FEW rows; step_of_many: of more; prompt: ``read_prompt``;
    block: the transformer's forward of the codes of a drawing (``Batch.read_block``)
    """

    step: Step
    step_of_many: Step
    prompt: Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
    block: Callable[[Tensor, Tensor, Tensor, Cache, slice], Tensor]

    @classmethod
    def of(cls, transformer: Transformer) -> "Compiled":
        config = torch._dynamo.config
        config.recompile_limit = max(FORMS, config.recompile_limit)
        mode = "reduce-overhead" if transformer.embed_tokens.weight.is_cuda else "default"
        read, prompt = (partial(one, transformer) for one in (read_token, read_prompt))
        return cls(
            torch.compile(read, dynamic=False, mode=mode),
            *(torch.compile(one, dynamic=True) for one in (read, prompt, transformer.forward)),
        )


def mark_addresses(cache: Cache) -> None:
    """Say that a cache stays where it is: only so is a function that writes to it a CUDA graph. For
    one that lies elsewhere the graph is recorded anew. Nothing on a CPU."""
    if cache.keys[0].is_cuda:
        for one in (*cache.keys, *cache.values):
            torch._dynamo.mark_static_address(one, guard=False)
