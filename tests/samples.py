"""Training samples of the tiny model and their batches, for the tests of training."""

from collections.abc import Sequence
from typing import Any

import torch

from multimodal.api import Model
from multimodal.model.batches import BatchBuilder, TrainingSample


def batch_builder(model: Model, row_length: int = 160) -> BatchBuilder:
    return BatchBuilder(
        vocabulary=model.vocabulary,
        objectives=model.config.objectives,
        templates=model.config.templates,
        encode=model.text_tokenizer.encode,
        layout=model.config.layout,
        reads=model.config.reads,
        row_length=row_length,
    )


def samples_of(
    records: Sequence[dict[str, Any]], seeds: Sequence[int] | None = None
) -> list[TrainingSample]:
    """A sample of one image for each record. Seeds are 0, 1, ... by default."""
    codes = torch.randint(64, (len(records), 16), generator=torch.Generator().manual_seed(0))
    return [
        TrainingSample(str(number), record, image[None], seed)
        for number, (record, image, seed) in enumerate(
            zip(records, codes.numpy(), seeds or range(len(records)), strict=True)
        )
    ]
