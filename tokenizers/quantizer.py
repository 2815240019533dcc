"""What every quantizer gives back, and how the health of a codebook is measured.

Shapes: B batch, h w the grid of codes, C the channels of a code vector, K the codebook size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multimodal.tokenizers.fsq import FSQ
    from multimodal.tokenizers.vq import VQ


@dataclass(frozen=True)
class Quantized:
    """One result type for all quantizers.

    codes: int64[B, h, w] in [0, K); vectors: float[B, h, w, C], what the decoder reads, with the
    gradient passed straight through; loss: float[], what the quantizer itself asks to be minimised.
    """

    codes: Tensor
    vectors: Tensor
    loss: Tensor


class Quantizer(Protocol):
    """latents: float[B, h, w, C] -> Quantized; codes: int64[...] -> vectors: float[..., C]."""

    codebook_size: int
    channels: int

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, codes: Tensor) -> Tensor: ...


def make_quantizer(name: str, **options: Any) -> "FSQ | VQ":
    """``fsq`` (levels) or ``vq`` (codebook_size, channels, ...)."""
    from multimodal.tokenizers.fsq import FSQ
    from multimodal.tokenizers.vq import VQ

    kinds: dict[str, type[FSQ] | type[VQ]] = {"fsq": FSQ, "vq": VQ}
    if name not in kinds:
        raise ValueError(f"quantizer {name!r}: expected one of {', '.join(kinds)}")
    return kinds[name](**options)


class CodebookUse:
    """Counts codes over many batches: the share of the codebook in use, and its perplexity."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        self.counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts))

    @property
    def used(self) -> float:
        """Share of the codes that appeared at all, in [0, 1]."""
        return float((self.counts > 0).float().mean())

    @property
    def perplexity(self) -> float:
        """exp(entropy) of the codes, in [1, K]: how many codes would be in use if used equally."""
        p = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.exp(-(p * p.clamp(min=1e-12).log()).sum()))
