"""Checks before the first step: whether the data fit, and teach what is to be learned."""

from collections.abc import Callable, Container
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.data.documents import document_of
from multimodal.data.shards import Shards
from multimodal.model.batches import BatchBuilder
from multimodal.model.sequences import NO_LOSS, OBJECTIVES, TokenSequence, describe
from multimodal.model.training_batch import TrainingSample

SAMPLES = 256  # of each folder, the first ones
UNUSABLE = 0.1  # the largest share of them that may be left out or cut
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
    check: Callable[[str, dict[str, Any]], object],
    resumed: bool = False,
    learned: Callable[[TrainingSample], TrainingSample] = lambda sample: sample,
) -> None:
    """Make every kind of sequence of the first samples, as training will.

    Args:
        builder: makes the batches of this training.
        shards: the training data.
        drawn: the folders whose images are learned to be drawn.
        limit: how many tokens the model reads.
        check: as for ``ShardDataset``.
        resumed: the configuration was checked before, and may name objectives without data.
        learned: what this training makes of a sample. Its errors count like those of ``check``.

    Raises:
        ValueError: if an image does not fit a row, a text of more than a tenth of the samples does
            not or they are unusable, or an objective that the configuration names has nothing to
            learn from.
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
        first, reasons = 0, list[str]()
        for sample in islice(folder, SAMPLES):
            first += 1
            try:
                document = document_of(sample)
                images = document.count(None) if document else 1
                codes = np.zeros((images, builder.layout.codes_per_image), np.int64)
                record = sample.record
                if not document or "preferences" in record:
                    check(sample.key, record)
                example = TrainingSample(
                    sample.key, record, codes, 0, document, drawn=folder.folder in drawn
                )
                sequences = list(builder.possible(learned(example)))
            except ValueError as error:
                reasons.append(str(error))
                continue
            for sequence in sequences:
                taught |= _taught(sequence, builder.vocabulary.text_size)
            if any(sequence.cut for sequence in sequences):
                reasons.append(
                    f"sample {sample.key}: a text does not fit row_length={length} and would be "
                    "cut: raise it"
                )
        count += first
        if len(reasons) > UNUSABLE * first and not resumed:
            raise ValueError(
                f"{folder.folder}: {len(reasons)} of the first {first} samples cannot be used as "
                f"they are: {reasons[0]}"
            )
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
