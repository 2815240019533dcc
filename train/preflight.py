"""Checks before the first step: whether the data fit, and teach what is to be learned."""

from collections.abc import Container
from itertools import islice
from pathlib import Path

import numpy as np

from multimodal.data.documents import document_of
from multimodal.data.shards import Shards
from multimodal.model.batches import BatchBuilder, TrainingSample
from multimodal.model.sequences import NO_LOSS, OBJECTIVES, TokenSequence, describe

SAMPLES = 256  # of each folder, the first ones
NEEDS = {
    "caption": "a caption",
    "answer": "a question or a statement with its answer",
    "text": "a text",
    "image": "an image (next_token_share says how many are drawn)",
    "reconstruct": "an image of its own (reconstruct_share says how many are masked)",
}


def check_data(
    builder: BatchBuilder,
    shards: list[Shards],
    drawn: Container[Path],
    limit: int,
    resumed: bool = False,
) -> None:
    """Make every kind of sequence of the first samples, as training will.

    Args:
        builder: makes the batches of this training.
        shards: the training data.
        drawn: the folders whose images are learned to be drawn.
        limit: how many tokens the model reads.
        resumed: the configuration was checked before, and may name objectives without data.

    Raises:
        ValueError: if a sequence does not fit a row, or an objective that the configuration names
            has nothing to learn from.
    """
    objectives, length = builder.objectives, builder.row_length
    if length > limit:
        raise ValueError(f"row_length={length}: the model reads at most {limit} tokens")
    shortest = len(describe(builder.vocabulary, [0] * len(builder.read), [[]]))
    if length < shortest:
        raise ValueError(
            f"row_length={length}: an image of {len(builder.read)} codes needs {shortest}"
        )
    taught, count = set[str](), 0
    for folder in {source.folder: source for source in shards}.values():
        for sample in islice(folder, SAMPLES):
            count += 1
            document = document_of(sample)
            images = document.count(None) if document else 1
            codes = np.zeros((images, builder.layout.codes_per_image), np.int64)
            example = TrainingSample(
                sample.key, sample.record, codes, 0, document, drawn=folder.folder in drawn
            )
            try:
                for sequence in builder.possible(example):
                    taught |= _taught(sequence, builder.vocabulary.text_size)
            except ValueError as error:
                raise ValueError(f"{folder.folder}: {error}") from error
    none = f"none of the first {count:,} training samples has"
    for name, weight in objectives.weights.items():
        if weight and name not in taught and not resumed:
            raise ValueError(
                f"objectives.weights has {name}: {weight}, but {none} {NEEDS[name]}; "
                f"give such data, or leave {name} out"
            )
    if not (objectives.alignment_weight or any(map(objectives.weight_of, taught))):
        raise ValueError(f"{none} anything that an objective with a weight could learn from")


def _taught(sequence: TokenSequence, text_size: int) -> set[str]:
    """The objectives that have a target in a sequence. Of texts <boi> and <eos> alone are none."""
    taught = set()
    for number in set(sequence.objectives.tolist()) - {NO_LOSS}:
        name = OBJECTIVES[number]
        targets = sequence.targets[sequence.objectives == number]
        if name not in ("text", "caption", "answer") or (targets < text_size).any():
            taught.add(name)
    return taught
