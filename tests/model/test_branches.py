"""A branch of a sequence is what a sequence of its own would be: states, losses, gradients."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.model.sequences import NO_LOSS, Packed, TokenSequence, describe, draw, pack

CODES = np.arange(16) * 5 % 64
TEXTS = [list(b"two dogs"), list(b"a cat"), list(b"")]
TURNS = [(list(b"what? "), list(b"a dog")), (list(b"how? "), list(b"so"))]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.1)


def together_and_alone(model: Model) -> tuple[TokenSequence, list[TokenSequence]]:
    v = model.vocabulary
    alone = [describe(v, CODES, [text]) for text in TEXTS] + [describe(v, CODES, [], TURNS)]
    alone.insert(1, alone.pop())  # the questions follow the first caption
    return describe(v, CODES, TEXTS, TURNS), alone


def losses(model: Model, packed: Packed) -> Tensor:
    """float32: the loss of each prediction, in the order of the rows."""
    logits = model.network.transformer.logits(model.network.hidden(packed))
    log_p = logits.log_softmax(-1).gather(-1, packed.targets[..., None])[..., 0]
    return -log_p[packed.objectives != NO_LOSS]


@pytest.mark.parametrize("row_length", [80, 200])
def test_branches_are_separate_sequences(model: Model, row_length: int) -> None:
    """Alone in a row, and packed beside others."""
    sequence, alone = together_and_alone(model)
    v = model.vocabulary
    others = [draw(v, TEXTS[0], CODES, CODES % 2 > 0), describe(v, CODES[::-1], TEXTS[:2])]
    packed = pack([*others, sequence] if row_length > 80 else [sequence], row_length, v.pad)
    with torch.inference_mode():
        states = model.network.hidden(packed).flatten(0, 1)
        start = int(packed.states[-1]) - sequence.state
        ours = states[start : start + len(sequence)]
        trunk = int((sequence.branches == 0).sum())
        for number, one in enumerate(alone, start=1):
            expected = model.network.hidden(pack([one], len(one), v.pad))[0]
            branch = torch.from_numpy(sequence.branches == number)
            assert one.ids[trunk:].tolist() == sequence.ids[sequence.branches == number].tolist()
            assert (ours[branch] - expected[trunk:]).abs().max() < 1e-5
            assert (ours[:trunk] - expected[:trunk]).abs().max() < 1e-5
        first = [int((sequence.branches < n).sum()) for n in range(1, 5)]
        assert all((ours[a] - ours[b]).abs().max() < 1e-5 for a, b in pairwise(first)), "<eoi>"


def test_the_joint_gradient_is_that_of_separate_sequences(model: Model) -> None:
    sequence, alone = together_and_alone(model)
    transformer = model.network.transformer

    def loss_and_gradients(sequences: list[TokenSequence]) -> tuple[Tensor, list[Tensor]]:
        packed = [pack([one], len(one), model.vocabulary.pad) for one in sequences]
        loss = torch.cat([losses(model, rows) for rows in packed]).mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(transformer.parameters())))

    loss, gradients = loss_and_gradients([sequence])
    expected_loss, expected = loss_and_gradients(alone)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def test_a_token_of_a_branch_changes_no_other_branch(model: Model) -> None:
    sequence, _ = together_and_alone(model)

    def states(ids: np.ndarray) -> Tensor:
        packed = pack([replace(sequence, ids=ids)], len(sequence), model.vocabulary.pad)
        with torch.inference_mode():
            return model.network.hidden(packed)[0]

    base, branches = states(sequence.ids), sequence.branches
    for position in range(0, len(sequence), 3):
        ids = sequence.ids.copy()
        ids[position] = ids[position] - 1
        changed = ((states(ids) - base).abs().amax(-1) > 1e-5).numpy()
        later = np.arange(len(sequence)) >= position
        own = (branches == branches[position]) | (branches[position] == 0)
        assert changed.tolist() == (later & own).tolist(), position
