"""Attention maps: which tokens each token looks at, in each layer and head.

Attention itself never has them whole: its kernels keep no weights. So the queries and keys of each
layer are computed once more, from what enters it.

Shapes: B rows, L tokens, H heads, G key-value heads, d head size, N layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from multimodal.model.layers.transformer import ALL, Attention, Transformer


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The softmax of attention.

    Args:
        q: float[B, H, L, d].
        k: float[B, G, S, d]. H is a multiple of G.
        mask: bool[B, 1, L, S], True where a query sees a key.

    Returns:
        float32[B, H, L, S], each row of which sums to 1.
    """
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = (q.float() * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@torch.inference_mode()
def attention_maps(
    transformer: Transformer, ids: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """The attention of all layers to tokens that are read in one pass.

    Args:
        ids, positions: int64[B, L].
        mask: bool[B, 1, L, L], see ``attention_mask``.

    Returns:
        float32[N, B, H, L, L]: of each query its weights on the keys.
    """
    maps: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        x, cos_sin, *_ = arguments
        q, k, _ = module.heads(x, cos_sin, ALL)
        maps.append(attention_weights(q, k, mask))

    parts = [part for part in transformer.modules() if isinstance(part, Attention)]
    handles = [part.register_forward_pre_hook(record) for part in parts]
    try:
        transformer(ids, positions, mask)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(maps)
