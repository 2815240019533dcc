"""How the next token is chosen from its logits.

What is drawn for a row depends on (seed, number of the row) alone, never on the rows beside it.

Shapes: B rows, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from multimodal.devices import moved
from multimodal.options import Sampling

NOTHING = -1  # in the place of an id, where a host has not looked yet whether logits are finite
NOT_FINITE = "logits are not finite, or nothing can be chosen: weights that are not numbers"


def generators(sampling: Sampling, numbers: Iterable[int]) -> list[torch.Generator]:
    """A source of random numbers for each row, by its number."""
    seeds = (np.random.SeedSequence([sampling.seed, row]).generate_state(1) for row in numbers)
    return [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits over the temperature, -inf for what is left out: float[..., V] -> float[..., V].

    Not for a temperature of 0.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        # The share of the tokens before it: never too much for the first one.
        beyond = share.cumsum(-1) - share >= sampling.top_p
        outside = torch.zeros_like(beyond).scatter(-1, order, beyond)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def penalise(logits: Tensor, generated: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make tokens less likely that a text already has.

    Args:
        logits: float[B, V].
        generated: the ids of each of the B texts.
        penalty: divides positive logits, multiplies negative ones. 1 changes nothing.
    """
    if penalty == 1:
        return logits
    # All rows at once, as places in the flat logits: one copy to a GPU, and a handful of kernels.
    rows = zip(range(len(logits)), generated, strict=True)
    places = [row * logits.shape[1] + token for row, ids in rows for token in set(ids)]
    repeated = moved(torch.tensor(places, dtype=torch.int64), logits.device)
    flat = logits.clone(memory_format=torch.contiguous_format).view(-1)
    scores = flat[repeated]
    flat[repeated] = torch.where(scores > 0, scores / penalty, scores * penalty)
    return flat.view_as(logits)


def choose(logits: Tensor, sampling: Sampling, dice: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row: float[B, ..., V] -> int64[B, ...].

    Args:
        dice: a generator for each of the B rows.

    Raises:
        ValueError: if the logits are not finite. At a temperature of 0 such a row gets NOTHING
            instead, and who reads the ids raises: no host waits for a GPU here.
    """
    if sampling.temperature == 0:
        best = logits.max(-1)  # NaN, if there is one
        return best.indices.masked_fill(~best.values.isfinite(), NOTHING)
    # One random number a choice, looked up in the cumulated probabilities. Gumbel noise for each
    # token of a large vocabulary would take longer than a step of a small model.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no float64
    cumulated = truncate(logits, sampling).softmax(-1, dtype=exact).cumsum(-1)
    end, shape = cumulated[..., -1], logits.shape[1:-1]
    shares = [torch.rand(shape, generator=generator, dtype=exact) for generator in dice]
    # A share is below 1, so its product is below the end: no token of probability 0 is reached.
    targets = moved(torch.stack(shares), cumulated.device) * end
    chosen = torch.searchsorted(cumulated, targets[..., None], right=True)[..., 0]
    if not end.isfinite().all():  # the host waits for a GPU here, once, with all of it under way
        raise ValueError(
            f"{NOT_FINITE}, or temperature={sampling.temperature} is too small (0 takes the most "
            "likely token)"
        )
    return chosen
