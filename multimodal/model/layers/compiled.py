"""The transformer's forward passes of inference, compiled by torch.

A compiled step is a handful of kernels. For few rows it has static shapes: the whole cache, with a
mask over the slots that are not filled. For many rows, for prompts and for the codes of a drawing
it serves any shape. Each form takes ten to thirty seconds to compile when it is first called. On a
CUDA device steps are graphs instead (model/layers/graphs.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from multimodal.model.layers.attention import KVCache
from multimodal.model.layers.transformer import Transformer

Step: TypeAlias = Callable[
    [Tensor, Tensor, Tensor | None, list[Tensor], list[Tensor], Tensor], Tensor
]
ROOM_MULTIPLE = 128  # the capacity of a cache is a multiple of this: each new one is recompiled
RECOMPILE_LIMIT = 64  # torch's own limit of 8 ends at 512 tokens of few rows, in silence


@dataclass(frozen=True)
class CompiledForward:
    """Compiled when first called. A copy of a network with it computes with the copy's weights.

    Attributes:
        step: ``Transformer.forward_token`` for up to MAX_STATIC_ROWS rows, once for each shape.
        step_dynamic: the same for more rows and any shape.
        prompt: ``Transformer.forward_prompt``.
        block: ``Transformer.forward`` for the codes of a drawing (``DecodeBatch.forward_block``).
    """

    step: Step
    step_dynamic: Step
    prompt: Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]
    block: Callable[[Tensor, Tensor, Tensor, KVCache, slice], Tensor]

    @classmethod
    def of(cls, transformer: Transformer) -> "CompiledForward":
        config = torch._dynamo.config
        config.recompile_limit = max(RECOMPILE_LIMIT, config.recompile_limit)

        def bound(method: Callable[..., Tensor], dynamic: bool = True) -> Callable[..., Tensor]:
            # deepcopy copies what a partial binds. A compiled method would keep its transformer.
            return partial(torch.compile(method, dynamic=dynamic), transformer)

        return cls(
            step=bound(Transformer.forward_token, dynamic=False),
            step_dynamic=bound(Transformer.forward_token),
            prompt=bound(Transformer.forward_prompt),
            block=bound(Transformer.forward),
        )
