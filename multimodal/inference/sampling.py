"""How the next token is chosen from its logits.

What is drawn for row i depends on (seed, i) alone, never on the rows beside it.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


class SamplingOptions(TypedDict, total=False):
    """The arguments of ``Sampling``, for functions that pass them on."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    beams: int
    length_penalty: float
    seed: int


@dataclass(frozen=True)
class Sampling:
    """Args:
    temperature: divides the logits; 0 takes the likeliest token (greedy).
    top_k: draw from the k likeliest tokens only; 0 means all.
    top_p: draw from the fewest tokens that have this share of the probability (nucleus sampling,
        Holtzman et al. 2019, arXiv:1904.09751); 1 means all.
    min_p: draw only tokens at least this share as likely as the likeliest (Nguyen et al. 2024,
        arXiv:2407.01082); 0 means all.
    repetition_penalty: of a text's own tokens, logits are divided by it where positive and
        multiplied where negative (CTRL, Keskar et al. 2019, arXiv:1909.05858); 1 is none.
    beams: of a text, follow so many beginnings at once and take the likeliest whole (beam search);
        with temperature 0. length_penalty: its score is the log probability over the length to the
        power of this.
    seed: of all that is random; at least 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected a number from 0 on")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: expected a share in [0, 1]")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: expected more than 0 (1: none)"
            )
        if self.beams < 1:
            raise ValueError(f"beams={self.beams}: expected at least 1")
        if self.beams > 1 and (self.temperature or self.repetition_penalty != 1):
            raise ValueError(
                f"beams={self.beams} search for the likeliest text: without temperature and penalty"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected 0 or more")

    def generators(self, rows: Iterable[int]) -> list[torch.Generator]:
        """A source of random numbers for each row."""
        seeds = (np.random.SeedSequence([self.seed, row]).generate_state(1) for row in rows)
        return [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]

    def truncate(self, logits: Tensor) -> Tensor:
        """float[..., V]: the logits over the temperature, -inf for what is left out.

        Not for a temperature of 0.
        """
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.min_p > 0:
            least = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(-1)
            beyond = share.cumsum(-1) - share >= self.top_p  # of those before it; never the first
            outside = torch.zeros_like(beyond).scatter(-1, order, beyond)
            logits = logits.masked_fill(outside, -torch.inf)
        return logits

    def penalise(self, logits: Tensor, said: SequenceOf[SequenceOf[int]]) -> Tensor:
        """logits: float[B, V]; said: B lists of ids that were chosen before"""
        if self.repetition_penalty == 1:
            return logits
        logits = logits.clone()
        for row, ids in zip(logits, said, strict=True):
            own = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=row.device)
            scores = row[own]
            row[own] = torch.where(
                scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty
            )
        return logits

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """logits: float[B, ..., V]; generators: B -> int64[B, ...]

        Errors: ``ValueError`` where there is nothing to draw from.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        # One number for each choice, where it falls among the probabilities laid end to end: noise
        # for each token of a large vocabulary would take longer than a step of a small model.
        exact = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no more
        laid = self.truncate(logits).softmax(-1, dtype=exact).cumsum(-1)
        end, shape = laid[..., -1], logits.shape[1:-1]
        if not end.isfinite().all():
            raise ValueError(
                "logits are not finite, or nothing can be chosen: weights that are not numbers, or "
                f"temperature={self.temperature} is too small (0 takes the likeliest)"
            )
        shares = [torch.rand(shape, generator=one, dtype=exact) for one in generators]
        # A share is below 1, and its product below the end: what is -inf at the end is not reached.
        place = torch.stack(shares).to(laid.device) * end
        return torch.searchsorted(laid, place[..., None], right=True)[..., 0]
