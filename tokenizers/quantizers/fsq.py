"""Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): no codebook to collapse.

Each channel is squashed to a few integers. A code is their mixed-radix number.
"""

import math
import reprlib
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from multimodal.schemas import Between
from multimodal.tokenizers.quantizers.quantizer import MAX_CODEBOOK, Quantized, Quantizer

LevelCount = Annotated[int, Between(2, 2**16)]


def count_codes(levels: Sequence[int]) -> int:
    """The product of the levels.

    Raises:
        ValueError: for no levels, a level below 2, or more than MAX_CODEBOOK codes.
    """
    if not levels or min(levels) < 2:
        raise ValueError(f"levels={list(levels)}: expected at least one level count, each >= 2")
    # So many levels of 2 are too many codes already. The product of a long list takes minutes.
    if len(levels) >= MAX_CODEBOOK.bit_length() or math.prod(levels) > MAX_CODEBOOK:
        raise ValueError(f"levels={reprlib.repr(list(levels))}: codes, over {MAX_CODEBOOK:,}")
    return math.prod(levels)


class FSQ(Quantizer):
    """Finite scalar quantization.

    Args:
        levels: number of values of each channel, at least 2. Their product is the codebook size.

    Raises:
        ValueError: for no levels, a level below 2, or more than MAX_CODEBOOK codes.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[LevelCount] = (7, 5, 5, 5, 5)) -> None:
        super().__init__()
        self.codebook_size = count_codes(levels)
        self.channels = len(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def _bound(self, latents: Tensor) -> Tensor:
        """Squash each channel into (-L/2, L/2), so that rounding gives exactly L integers."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        # An even number of levels is not symmetric around 0: shift by half a step.
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents, float[B, h, w, C]."""
        # In fp32: a bf16 tanh moves latents across rounding boundaries.
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bound(latents.float())
            half_width = self.levels // 2
            # Of more than 1001 levels the bound reaches past the last integer.
            nearest = bounded.round().clamp(-half_width, (self.levels - 1) // 2)
            integers = bounded + (nearest - bounded).detach()
            codes = ((integers.detach() + half_width) * self.basis).sum(-1).round().long()
            return Quantized(codes, integers / half_width, {}, self.codebook_size)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C] in [-1, 1]."""
        digits = codes[..., None] // self.basis % self.levels
        half_width = self.levels // 2
        return (digits - half_width).float() / half_width
