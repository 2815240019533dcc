"""What every quantizer gives back, and how the health of a codebook is measured.

Shapes: B batch, h w the grid of codes, N = B h w, C the channels of a code vector, K the codebook
size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """One result type for all quantizers.

    codes: int64[B, h, w] in [0, K); vectors: float[B, h, w, C], what the decoder reads, with the
    gradient passed straight through; losses: by name, each a weighted float32[], what the
    quantizer itself asks to be minimised; codebook_size: K.
    """

    codes: Tensor
    vectors: Tensor
    losses: dict[str, Tensor]
    codebook_size: int

    @property
    def usage(self) -> float:
        """Share of the codebook among these codes, in (0, 1]."""
        return len(torch.unique(self.codes)) / self.codebook_size


class Quantizer(Protocol):
    """latents: float[B, h, w, C] -> Quantized; codes: int64[...] -> vectors: float[..., C]."""

    codebook_size: int
    channels: int

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, codes: Tensor) -> Tensor: ...


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sample_codebook(flat: Tensor, count: int) -> Tensor:
    """Latents of a batch, float[N, C], at random, one for each of so many codes: float[count, C].

    The same on all ranks. A little noise keeps repeated ones apart.
    """
    chosen = flat[torch.randint(len(flat), (count,), device=flat.device)]
    drawn = chosen + 0.01 * torch.randn_like(chosen)
    if distributed():
        dist.broadcast(drawn, 0)
    return drawn


def entropy_of(probabilities: Tensor) -> Tensor:
    """float[..., K] that sum to 1 -> float[...], in nats"""
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1)


class CodebookUsage:
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
        return float(entropy_of(p).exp())

    @property
    def has_enough_codes(self) -> bool:
        """Whether so many codes were counted that a healthy codebook would show."""
        return int(self.counts.sum()) >= 4 * len(self.counts)

    def collapse_warning(self) -> str | None:
        """What is wrong, in plain words, or None. Too few codes to tell are no collapse."""
        seen, size = int(self.counts.sum()), len(self.counts)
        if not self.has_enough_codes:
            return None
        if self.used >= 0.5 and self.perplexity >= 0.05 * size:
            return None
        return (
            f"the codebook collapses: of {size} codes {self.used:.1%} appeared among the last "
            f"{seen}, as if only {self.perplexity:.0f} were in use. A smaller learning rate, a "
            "smaller codebook, fewer channels, or fsq, which has no codebook to lose, may help"
        )
