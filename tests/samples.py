"""Training samples of the tiny model and their batches, for the tests of training."""

from collections.abc import Sequence
from typing import Any

import torch

from multimodal.model.training_batch import TrainingSample


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
