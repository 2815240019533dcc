"""What a training step is given: samples, and the batch that is made of them.

Shapes: B samples, n codes of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multimodal.devices import moved
from multimodal.model.distillation import Teaching
from multimodal.model.objectives import PolicyTokens, Predicted
from multimodal.model.preference_loss import Completions
from multimodal.model.sequences import Ids, Packed


@dataclass(frozen=True)
class Written:
    """A text about an image, or a drawing, that the network made itself.

    Attributes:
        ids: of a text up to <eos>, or up to the last token that there was room for. Of a drawing
            those of its codes, of the levels that are drawn.
        advantage: how much better it was than expected.
        prompt: what is before it: behind an image nothing or a question, before a drawing its text.
    """

    ids: Sequence[int]
    advantage: float
    prompt: Sequence[int] = ()


@dataclass(frozen=True)
class TrainingSample:
    """One sample of a batch.

    Attributes:
        key: its name. Equal keys are the same image to the alignment loss.
        record: what ``KEY.json`` holds.
        codes: int64[images, n], the codes of its images.
        seed: decides everything random about it.
        document: the texts of a document in their order, with None in the place of each image.
            Empty for an image with texts about it.
        written: texts about its image, or drawings, that the network made itself.
        drawn: whether its image may be learned to be drawn.
        source: the number of the folder that it is from.
    """

    key: str
    record: Mapping[str, Any]
    codes: Ids
    seed: int
    document: Sequence[str | None] = ()
    written: Sequence[Written] = ()
    drawn: bool = True
    source: int = 0


@dataclass(frozen=True)
class TrainingBatch:
    """What one forward pass reads.

    A document takes part in the alignment loss as an image without a text, so that every rank has
    the same number of pairs.

    Attributes:
        packed: the rows.
        image_positions: int64[B], where in the flattened rows each image embedding is (<eoi>).
        text_positions: int64[B], where each text embedding is (<boi>).
        image_hashes: int64[B], equal for equal images.
        text_hashes: int64[B], equal for equal texts. -1: there is no text, or it was dropped.
        tokens: tokens that are not padding.
        cut: the numbers of the samples of which a text was cut, because it did not fit a row.
        policy: what the network made itself, in reward training.
        completions: what is compared, in preference training.
        teaching: what a teacher says of the rows, in distillation.
        predicted: which positions of the rows have a target. By default they are searched for.
    """

    packed: Packed
    image_positions: Tensor
    text_positions: Tensor
    image_hashes: Tensor
    text_hashes: Tensor
    tokens: int
    cut: tuple[int, ...] = ()
    policy: PolicyTokens | None = None
    completions: Completions | None = None
    teaching: Teaching | None = None
    predicted: Predicted | None = None

    def __post_init__(self) -> None:
        if self.predicted is None:
            object.__setattr__(self, "predicted", Predicted.of(self.packed))

    def to(self, device: torch.device) -> "TrainingBatch":
        names = ("image_positions", "text_positions", "image_hashes", "text_hashes")
        tensors: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        parts = {name: getattr(self, name) for name in ("packed", "predicted")}
        parts |= {name: getattr(self, name) for name in ("policy", "completions")}
        there = {name: part.to(device) for name, part in parts.items() if part is not None}
        return replace(self, **tensors, **there)
