"""How something is measured: what an evaluator is given, what it yields, and what is made of it.

A value is a number, or what every sample (or question) got: then the score is the mean, and it
comes with a confidence interval.

Shapes: N samples, n codes of an image.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.data.samples import Sample
from multimodal.distributed import gather_objects, rank, world_size
from multimodal.eval.metrics.clip_score import ClipScore
from multimodal.inference.text import encode_images
from multimodal.model.network import Multimodal


@dataclass(frozen=True)
class PerQuestion:
    """Values of which several may be of one sample: owners, its number for each."""

    values: Sequence[float]
    owners: Sequence[int]


Value: TypeAlias = float | Sequence[float] | PerQuestion
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Example:
    """One sample as it went; score: the higher, the better."""

    key: str
    text: str
    score: float
    image: Image.Image


@dataclass
class Subject:
    """What is measured: a model, and samples with their images. on_batch: is told of progress;
    clip: another judge of how images fit texts, where there is one."""

    model: Multimodal
    samples: list[Sample]
    batch_size: int = 32
    seed: int = 0
    on_batch: Callable[[int], object] = lambda count: None
    clip: ClipScore | None = None

    @cached_property
    def images(self) -> list[Image.Image]:
        return [open_image(sample.image, name=sample.key) for sample in self.samples]

    @cached_property
    def pixels(self) -> Tensor:
        """float32[N, 3, H, W] in [-1, 1], as the model sees them"""
        config = self.model.image_tokenizer.config
        fitted = [fit_image(image, config.image_size, config.fit) for image in self.images]
        return torch.stack([to_tensor(image) for image in fitted])

    def encoded(self, pixels: Tensor) -> Tensor:
        """float32[N, 3, H, W] in [-1, 1] -> codes: int64[N, n]"""
        return self.rows_over(lambda some: encode_images(self.model, some), pixels)

    @cached_property
    def codes(self) -> Tensor:
        """int64[N, n]"""
        return self.encoded(self.pixels)

    def over(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
        """What ``work`` makes of the items, one for each and in their order.

        It is given a batch at a time; of several ranks each does a share, and all get the whole.
        """
        size = -(-len(items) // world_size())
        share = items[rank() * size : (rank() + 1) * size]
        found: list[U] = []
        for start in range(0, len(share), self.batch_size):
            part = share[start : start + self.batch_size]
            found += work(part)
            self.on_batch(len(part))
        assert len(found) == len(share), f"{len(found)} results of {len(share)} items"
        return gather_objects(found)

    def rows_over(self, work: Callable[[Tensor], Tensor], read: Tensor) -> Tensor:
        """``over`` the rows of a tensor, for work that makes another: float[N, ...]"""
        made = self.over(range(len(read)), lambda rows: list(work(read[list(rows)]).cpu()))
        return torch.stack(made)


class Evaluator(Protocol):
    """``fits``: whether a sample can be measured; ``measure`` is given those that can."""

    name: ClassVar[str]
    protocol: ClassVar[str]
    examples: list[Example]

    def fits(self, sample: Sample) -> bool: ...
    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]: ...


def interval(
    values: Sequence[float], seed: int = 0, owners: Sequence[int] | None = None, rounds: int = 1000
) -> tuple[float, float]:
    """Of the mean, 95 %: by the bootstrap over samples (Efron 1979), percentiles.

    owners: the sample of each value, where a sample has several: they are drawn together.
    """
    rng = torch.Generator().manual_seed(seed)
    each = torch.tensor(values, dtype=torch.float64)
    groups = torch.arange(len(each)) if owners is None else torch.tensor(owners)
    groups = torch.unique(groups, return_inverse=True)[1]
    count = int(groups.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, each)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, torch.ones_like(each))
    picks = torch.randint(count, (rounds, count), generator=rng)
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def evaluate(evaluator: Evaluator, subject: Subject) -> dict[str, Any]:
    """name -> {"value"}, with "low", "high" and "n" where it is a mean over samples."""
    results: dict[str, Any] = {}
    for name, value in evaluator.measure(subject):
        owners = value.owners if isinstance(value, PerQuestion) else None
        values = value.values if isinstance(value, PerQuestion) else value
        if isinstance(values, Sequence):
            low, high = interval(values, subject.seed, owners)
            mean = sum(values) / len(values)
            results[name] = {"value": mean, "low": low, "high": high, "n": len(values)}
        else:
            results[name] = {"value": float(values)}
    return results


def chosen(examples: list[Example], count: int, seed: int) -> dict[str, list[Example]]:
    """The best, the worst, and some that chance chose."""
    ranked = sorted(examples, key=lambda one: (-one.score, one.key))
    picked = random.Random(f"examples/{seed}").sample(examples, min(count, len(examples)))
    return {"best": ranked[:count], "worst": ranked[::-1][:count], "random": picked}
