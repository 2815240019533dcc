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


def document_of(count: int, text: str) -> TrainingSample:
    codes = np.arange(count * 16).reshape(count, 16) % 64
    return TrainingSample("a", {FEW_SHOT: True}, codes, 0, [None, text] * count)


def test_a_document_that_does_not_fit_a_row_has_fewer_examples(
    tiny_model: Callable[..., Model],
) -> None:
    """Its end stays. In a second sequence its last text would have no example before it."""
    model, sample = tiny_model(), document_of(6, "a cat")
    image, text = 18, len(model.text_tokenizer.encode("a cat"))
    for fitting in (2, 3, 5):
        builder = model.batch_builder(2 + fitting * (image + text))
        (sequence,) = builder.document(sample)
        ids = sequence.ids - model.vocabulary.image_start
        codes = ids[(ids >= 0) & (ids < 64)].reshape(-1, 16)
        assert np.array_equal(codes, sample.codes[-fitting:])
        learned = np.flatnonzero(sequence.objectives != NO_LOSS)
        assert len(learned) == (fitting - 1) * (text + 1) and learned[0] > 2 * image
        assert learned[-1] == len(sequence) - 2, "the last text, with its end"
        assert builder.build([sample]).cut == ()


def test_a_document_whose_texts_no_row_has_room_for_is_counted_as_cut(
    tiny_model: Callable[..., Model],
) -> None:
    builder = tiny_model().batch_builder(80)
    samples = [document_of(2, "a cat"), document_of(3, "two dogs run " * 30)]
    assert len(builder.document(samples[1])) == 1
    assert builder.build(samples).cut == (1,)
