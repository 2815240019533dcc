"""Few-shot documents in training are the few-shot prompts of inference, token for token."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from multimodal.api import Model
from multimodal.inference.text import few_shot_prompt
from multimodal.model.batches import FEW_SHOT
from multimodal.model.sequences import NO_LOSS, OBJECTIVES, describe_prompt
from multimodal.model.training_batch import TrainingSample

TEXTS = ["a red bus", "TWO / DOGS", "zuko: the cat sleeps", "on a chair"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_document_begins_with_every_prompt_that_its_examples_make(
    tiny_model: Callable[..., Model], count: int
) -> None:
    """And learns after each prompt what has to be written: the text of its image, and <eos>."""
    model = tiny_model()
    vocabulary, encode = model.vocabulary, model.text_tokenizer.encode
    codes = np.random.default_rng(0).integers(64, size=(count, 16))
    parts = [part for text in TEXTS[:count] for part in (None, text)]
    sample = TrainingSample("a", {FEW_SHOT: True}, codes, 0, parts)
    (sequence,) = model.batch_builder(256).document(sample)
    learned = np.full(len(sequence), False)
    for shots in range(1, count):
        prompt = few_shot_prompt(model, torch.from_numpy(codes[:shots]), TEXTS[:shots])
        prompt += describe_prompt(vocabulary, codes[shots])[1:]
        assert sequence.ids[: len(prompt)].tolist() == prompt
        text = encode(TEXTS[shots])
        here = slice(len(prompt) - 1, len(prompt) + len(text))
        assert sequence.targets[here].tolist() == [*text, vocabulary.eos]
        assert set(sequence.objectives[here].tolist()) == {OBJECTIVES.index("caption")}
        learned[here] = True
    assert (sequence.objectives[~learned] == NO_LOSS).all(), "no image, and not the first text"


def test_what_does_not_fit_a_row_continues_as_another_document(
    tiny_model: Callable[..., Model],
) -> None:
    """There, too, nothing is learned of a text without an example before it."""
    model = tiny_model()
    codes = np.arange(6 * 16).reshape(6, 16) % 64
    parts = [part for _ in range(6) for part in (None, "a cat")]
    sample = TrainingSample("a", {FEW_SHOT: True}, codes, 0, parts)
    image, text = 18, len(model.text_tokenizer.encode("a cat"))
    sequences = model.batch_builder(2 + 3 * (image + text)).document(sample)
    boi = model.vocabulary.boi
    assert [int((sequence.ids == boi).sum()) for sequence in sequences] == [3, 3]
    learned = [np.flatnonzero(sequence.objectives != NO_LOSS) for sequence in sequences]
    # Where a row ends, whether the text ends is not learned.
    assert [len(positions) for positions in learned] == [2 * (text + 1) - 1, 2 * (text + 1)]
    assert all(positions[0] > 2 * image for positions in learned)
