"""What an evaluator is, what it receives, and how its values become scores.

A value is a number, or a list with a number for each sample or question. For a list the score is
the mean, with a confidence interval. ``Estimate`` brings its own interval.

Shapes: N samples, n codes of an image.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from multimodal.api import Model
from multimodal.data.documents import codes_in, images_in
from multimodal.data.images import fit_image, open_image, to_image, to_tensor
from multimodal.data.samples import CODES, IMAGE_SUFFIXES, Sample, readable, texts_of
from multimodal.data.shards import Shards, splits_of
from multimodal.distributed import gather_objects, rank, world_size
from multimodal.energy import EnergyOptions
from multimodal.eval.metrics.clip_score import ClipScore
from multimodal.eval.metrics.proportions import Cases
from multimodal.inference.codec import decode_images, encode_images, text_fits


@dataclass(frozen=True)
class PerQuestion:
    """Values of questions, of which a sample may have several.

    Args:
        values: one for each question.
        rows: for each question, the number of its sample. Questions about the same sample stay
            together in the bootstrap.
    """

    values: Sequence[float]
    rows: Sequence[int]


@dataclass(frozen=True)
class Estimate:
    """A value with an interval of its own, such as a rate or the difference of two rates.

    Args:
        value: the estimate.
        low, high: its 95 % interval.
        n: number of samples behind it.
    """

    value: float
    low: float
    high: float
    n: int


TRAINING_SPLIT = "train"
MOST_SHOWN = 320  # pixels of a side, as many as the page shows
Value: TypeAlias = float | Sequence[float] | PerQuestion | Estimate
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Example:
    """The result of one sample, to look at.

    Args:
        key: of the sample.
        text: shown below the image.
        score: higher is better. It ranks the examples.
        image: to show.
    """

    key: str
    text: str
    score: float
    image: Image.Image


@dataclass
class Subject:
    """The model to measure, and the samples to measure it on.

    Args:
        model: in eval mode.
        samples: N samples that the evaluator fits.
        batch_size: items per batch.
        seed: of everything random.
        on_batch: called after each batch with its number of items.
        clip: judges drawings, if given.
        training: samples of the training split of the same folder.
        yardsticks: measure also what needs no model, if that takes more than seconds.
        cache: a folder for features of images that take minutes. None keeps nothing.
        energy: what energy is computed with.
    """

    model: Model
    samples: list[Sample]
    batch_size: int = 32
    seed: int = 0
    on_batch: Callable[[int], object] = lambda count: None
    clip: ClipScore | None = None
    training: Shards | Sequence[Sample] = ()
    yardsticks: bool = True
    cache: Path | None = None
    energy: EnergyOptions = EnergyOptions()

    @property
    def has_codes(self) -> bool:
        """Whether the samples hold codes in the place of images."""
        return any(CODES in sample.members for sample in self.samples)

    @cached_property
    def originals(self) -> Sequence[Image.Image]:
        """N images in their original size, opened when they are taken. Those of codes are decoded,
        or grey without detail.
        """
        if self.has_codes and not self.model.image_tokenizer.can_draw:
            return [Image.new("RGB", (64, 64), "grey")] * len(self.samples)
        if self.has_codes:
            decoded = self.map_rows(lambda batch: decode_images(self.model, batch), self.codes)
            return [to_image(image) for image in decoded]
        return OpenedWhenTaken(self.samples)

    @property
    def images(self) -> list[Image.Image]:
        """The N images to show: none has more than MOST_SHOWN pixels a side."""
        return self._read[0]

    @property
    def pixels(self) -> Tensor:
        """float32[N, 3, H, W] in [-1, 1], at the model's size."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[list[Image.Image], Tensor]:
        tokenizer, shown, pixels = self.model.image_tokenizer, [], []
        for image in self.originals:
            fitted = fit_image(image, tokenizer.image_size, tokenizer.fit)
            pixels.append(to_tensor(fitted))
            small = image.copy()  # those of codes are kept
            small.thumbnail((MOST_SHOWN, MOST_SHOWN))
            shown.append(small)
        return shown, torch.stack(pixels)

    @cached_property
    def codes(self) -> Tensor:
        """int64[N, n], the codes of the images."""
        if self.has_codes:
            return torch.stack([torch.from_numpy(s.codes[0].ravel()) for s in self.samples])
        return self.encode(self.pixels)

    def training_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and record of each training sample whose record can be read."""
        for number, sample in enumerate(self.training):
            for usable in readable([sample], lambda problem: None):
                yield number, usable.record

    def encode(self, pixels: Tensor) -> Tensor:
        """float32[N, 3, H, W] in [-1, 1] -> int64[N, n]."""
        return self.map_rows(lambda batch: encode_images(self.model, batch), pixels)

    def map_batches(
        self, items: Sequence[T], function: Callable[[Sequence[T]], Sequence[U]]
    ) -> list[U]:
        """Apply a function to items, one batch at a time.

        With several ranks each rank does a share. All ranks get all results.

        Args:
            items: any.
            function: a batch of items -> one result for each.

        Returns:
            One result for each item, in the order of the items.
        """
        size = -(-len(items) // world_size())
        share = items[rank() * size : (rank() + 1) * size]
        results: list[U] = []
        for start in range(0, len(share), self.batch_size):
            batch = share[start : start + self.batch_size]
            results += function(batch)
            self.on_batch(len(batch))
        assert len(results) == len(share), f"{len(results)} results of {len(share)} items"
        return gather_objects(results)

    def map_rows(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``map_batches`` over the rows of a tensor: [N, ...] -> [N, ...] on the CPU."""
        results = self.map_batches(
            range(len(rows)), lambda batch: list(function(rows[list(batch)]).cpu())
        )
        return torch.stack(results)


class OpenedWhenTaken(Sequence[Image.Image]):
    """The images of samples. All of them at once may be more than the memory holds."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [open_image(sample.image, name=sample.key) for sample in self.samples[row]]
        return open_image(self.samples[row].image, name=self.samples[row].key)


def is_one_image(sample: Sample) -> bool:
    """Whether a sample is an image, or its codes: no document, and no plain text."""
    return CODES in sample.members or any(suffix in sample.members for suffix in IMAGE_SUFFIXES)


def problem_of(sample: Sample, model: Model | None = None) -> str | None:
    """Why the record, an image or the codes of a sample cannot be read. None: they can.

    Args:
        model: has to have room for each text of the record beside an image.
    """
    try:
        record = sample.read_record()
        if any(name.endswith(CODES) for name in sample.members):
            codes_in(sample)
        else:
            for image in images_in(sample):
                open_image(image, name=f"sample {sample.key}")
    except ValueError as error:
        return str(error)
    if model is not None and not all(text_fits(model, text) for text in texts_of(record)):
        return f"sample {sample.key}: a text is longer than what the model reads"
    return None


def usable_samples(
    samples: Iterable[Sample],
    on_problem: Callable[[str], object],
    model: Model | None = None,
) -> Iterator[Sample]:
    """The samples that can be read. A bad one ends no evaluation.

    Args:
        on_problem: is told of each of the others, one line.
        model: see ``problem_of``.
    """
    for sample in samples:
        if (problem := problem_of(sample, model)) is None:
            yield sample
        else:
            on_problem(f"left out: {problem}")


def training_samples(folder: Path, split: str) -> Shards | Sequence[Sample]:
    """The training split of a shard folder. Empty if it has none, or if that split is measured."""
    has_training = split != TRAINING_SPLIT and TRAINING_SPLIT in splits_of(folder)
    return Shards(folder, TRAINING_SPLIT) if has_training else ()


class Evaluator(Protocol):
    """One task.

    name: of the task. protocol: how its scores are measured, in words. examples: filled by
    ``measure``. It may also fill ``notes``, a list of texts that are shown below the scores. With
    ``draws = True`` it is left out for models that have no decoder of images.
    """

    name: ClassVar[str]
    protocol: ClassVar[str]
    examples: list[Example]

    def fits(self, sample: Sample) -> bool:
        """Whether the evaluator can use this sample."""
        ...

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        """Yield (name of a score, its value). The subject has only samples that fit."""
        ...


def interval(
    values: Sequence[float], seed: int = 0, groups: Sequence[int] | None = None, rounds: int = 1000
) -> tuple[float, float]:
    """The 95 % confidence interval of a mean, by the percentile bootstrap (Efron 1979).

    Args:
        values: at least one.
        seed: of the resampling.
        groups: the group of each value. Values of a group are drawn together.
        rounds: number of resamplings.

    Returns:
        (low, high).
    """
    rng = torch.Generator().manual_seed(seed)
    each = torch.tensor(values, dtype=torch.float64)
    group_of = torch.arange(len(each)) if groups is None else torch.tensor(groups)
    group_of = torch.unique(group_of, return_inverse=True)[1]
    count = int(group_of.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, group_of, each)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, group_of, torch.ones_like(each))
    picks = torch.randint(count, (rounds, count), generator=rng)
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def value_of(cases: Cases, row_of: Sequence[int] | None = None) -> Value:
    """The value of cases. Without a case it is 0, and has no interval.

    Args:
        row_of: numbers of the samples that ``cases.rows`` stand for. By default themselves.
    """
    if not cases.values:
        return 0.0
    rows = cases.rows if row_of is None else [row_of[row] for row in cases.rows]
    return PerQuestion(cases.values, rows)


def evaluate(evaluator: Evaluator, subject: Subject) -> dict[str, Any]:
    """Measure a task.

    Returns:
        Name of a score -> {"value"}. A mean over samples and an ``Estimate`` also have "low",
        "high" (the 95 % interval) and "n".
    """
    results: dict[str, Any] = {}
    for name, value in evaluator.measure(subject):
        if isinstance(value, Estimate):
            results[name] = asdict(value)
            continue
        groups = value.rows if isinstance(value, PerQuestion) else None
        values = value.values if isinstance(value, PerQuestion) else value
        if isinstance(values, Sequence):
            low, high = interval(values, subject.seed, groups)
            mean = sum(values) / len(values)
            results[name] = {"value": mean, "low": low, "high": high, "n": len(values)}
        else:
            results[name] = {"value": float(values)}
    return results


def select_examples(examples: list[Example], count: int, seed: int) -> dict[str, list[Example]]:
    """The best, the worst and random examples, at most ``count`` of each."""
    ranked = sorted(examples, key=lambda example: (-example.score, example.key))
    picked = random.Random(f"examples/{seed}").sample(examples, min(count, len(examples)))
    return {"best": ranked[:count], "worst": ranked[::-1][:count], "random": picked}
