"""How the next token is chosen from its logits.

What is drawn for row i depends on (seed, i) alone, never on the rows beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Args:
    temperature: divides the logits; 0 takes the likeliest token (greedy).
    top_k: draw from the k likeliest tokens only; 0 means all.
    top_p: draw from the fewest tokens that have this share of the probability (nucleus sampling,
        Holtzman et al. 2019, arXiv:1904.09751); 1 means all.
    seed: of all that is random; at least 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected a number from 0 on")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share in (0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected 0 or more")

    def generators(self, rows: Iterable[int]) -> list[torch.Generator]:
        """A source of random numbers for each row."""
        seeds = (np.random.SeedSequence([self.seed, row]).generate_state(1) for row in rows)
        return [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]

    def truncate(self, logits: Tensor) -> Tensor:
        """float[..., V]: the logits over the temperature, -inf for what top_k and top_p leave out.

        Not for a temperature of 0.
        """
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= self.top_p  # of those before it; never the first
            outside = torch.zeros_like(beyond).scatter(-1, order, beyond)
            logits = logits.masked_fill(outside, -torch.inf)
        return logits

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """logits: float[B, ..., V]; generators: B -> int64[B, ...]"""
        if self.temperature == 0:
            return logits.argmax(-1)
        return (self.truncate(logits) + gumbel(logits, generators)).argmax(-1)


def gumbel(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Gumbel noise of the shape of float[B, ...]: argmax(logits + noise) is a draw from them."""
    noise = torch.empty(like.shape)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return -noise.log().to(like.device)
