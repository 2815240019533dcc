"""k-means (Lloyd 1982), the same on every run, for codebooks that are made without gradients.

Shapes: N vectors, C channels, K centres.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DISTANCES = 1 << 26  # distances in memory at a time: 256 MiB


def nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each vector.

    Args:
        vectors: float[N, C].
        centres: float[K, C].

    Returns:
        int64[N], and the squared distances, float[N].
    """
    half = centres.square().sum(1) / 2
    numbers, distances = [], []
    for part in torch.split(vectors, max(1, DISTANCES // len(centres))):
        # |v - c|^2 / 2 without |v|^2, which all centres share: one product instead of differences.
        least = (half - part @ centres.T).min(1)
        numbers.append(least.indices)
        distances.append((2 * least.values + part.square().sum(1)).clamp(min=0))
    return torch.cat(numbers), torch.cat(distances)


@dataclass(frozen=True)
class Clusters:
    """The result of ``kmeans``.

    Attributes:
        centres: float[K, C].
        error: the mean squared distance to the nearest centre.
        used: the share of the centres that have a vector, in (0, 1].
        perplexity: exp(entropy) of the numbers, in [1, K].
    """

    centres: Tensor
    error: float
    used: float
    perplexity: float


def kmeans(
    vectors: Tensor,
    count: int,
    rounds: int = 25,
    seed: int = 0,
    on_round: Callable[[float], object] = lambda error: None,
) -> Clusters:
    """Cluster vectors.

    A centre without vectors starts again at one of the vectors that lie farthest from theirs.

    Args:
        vectors: float32[N, C], N at least K.
        count: K.
        rounds: of assigning all vectors and moving all centres.
        seed: of the vectors that the centres start at.
        on_round: is given the mean squared distance of each round.

    Raises:
        ValueError: for fewer vectors than centres.
    """
    if len(vectors) < count:
        raise ValueError(f"{len(vectors)} vectors for {count} codes: give more images")
    generator = torch.Generator().manual_seed(seed)
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:count]].clone()
    for _ in range(rounds):
        numbers, distances = nearest(vectors, centres)
        counts = torch.bincount(numbers, minlength=count)
        sums = torch.zeros_like(centres, dtype=torch.float64)
        sums.index_add_(0, numbers, vectors.double())
        centres = (sums / counts.clamp(min=1)[:, None]).to(vectors.dtype)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = vectors[distances.topk(len(empty)).indices]
        on_round(float(distances.mean()))
    numbers, distances = nearest(vectors, centres)
    shares = torch.bincount(numbers, minlength=count) / len(vectors)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return Clusters(
        centres, float(distances.mean()), float((shares > 0).float().mean()), float(entropy.exp())
    )
