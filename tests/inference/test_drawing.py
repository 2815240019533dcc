"""Drawings are complete, seeded, guided; the steps and the order of masked drawing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.codec import UNKNOWN, decode_images
from multimodal.inference.drawing import draw_codes, spread_order
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.model.sequences import draw, pack
from multimodal.options import DrawOptions, Sampling

TEXTS = ["a red bus", "two dogs run on the beach"]
MASKED = DrawOptions(method="masked")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.1)


def test_a_drawing_has_all_its_codes(model: Model) -> None:
    for steps in (1, 2, 5, 16, 40):
        codes = draw_codes(model, TEXTS, replace(MASKED, steps=steps))
        assert codes.shape == (2, 16) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < 64
    images = decode_images(model, codes)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1


def test_the_same_seed_draws_the_same(model: Model) -> None:
    texts = ["a red bus", "two dogs"]

    def draw(temperature: float, seed: int) -> Tensor:
        options = DrawOptions(method="masked", temperature=temperature, seed=seed)
        return draw_codes(model, texts, options)

    first = draw(1.0, seed=3)
    torch.manual_seed(99)  # the global state has no part in it
    assert torch.equal(first, draw(1.0, seed=3))
    assert not torch.equal(first, draw(1.0, seed=4))
    assert torch.equal(draw(0.0, seed=3), draw(0.0, seed=4))


def test_guidance(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 is none, and costs no second row. 0 ignores the text. Near 1 is nearly none."""
    rows: list[int] = []
    logits = type(model.network.transformer).logits

    def counted(self: object, hidden: Tensor, ids: slice) -> Tensor:
        rows.append(len(hidden))
        return logits(self, hidden, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.network.transformer), "logits", counted)

    def draw(scale: float, texts: list[str] = TEXTS) -> Tensor:
        return draw_codes(model, texts, replace(MASKED, guidance_scale=scale, steps=6))

    plain = draw(1)
    assert sum(rows) == 2 * 16, "each code once"
    assert torch.equal(plain, draw(1 + 1e-6))
    assert sum(rows) == 2 * 16 + 4 * 16
    assert not torch.equal(plain, draw(4))
    unconditional = draw(0)
    assert not torch.equal(plain, unconditional)
    assert torch.equal(unconditional, draw(0, TEXTS[::-1]))


def test_the_text_matters_and_its_neighbours_do_not(model: Model) -> None:
    cold = replace(MASKED, temperature=0, steps=6)
    a, b = draw_codes(model, TEXTS, cold)
    assert not torch.equal(a, b)
    assert torch.equal(a, draw_codes(model, TEXTS[:1], cold)[0])
    assert torch.equal(b, draw_codes(model, TEXTS[1:], cold)[0])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_cold_step_is_the_prediction_that_training_learns(
    model: Model, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A step reads the sequence of ``draw`` with its masked and known codes."""
    v, text = model.vocabulary, model.text_tokenizer.encode("a red bus")
    seen: list[Tensor] = []

    def choose(logits: Tensor, options: Sampling, dice: object) -> Tensor:
        seen.append(logits[0])
        return logits.argmax(-1)

    monkeypatch.setattr("multimodal.inference.drawing.choose", choose)
    options = replace(MASKED, steps=steps, guidance_scale=1)
    codes = draw_codes(model, ["a red bus"], options)[0].numpy()
    order, done = spread_order(4).numpy(), 0
    for logits in seen:
        masked = (order >= done) & (order < done + len(logits))
        sequence = draw(v, text, np.where(order < done, codes, 0), masked, order < done)
        assert len(sequence) == sequence.state + 1 + done + len(logits)
        with torch.inference_mode():
            hidden = model.network.hidden(pack([sequence], 60, v.pad))[0, : len(sequence)]
            expected = model.network.transformer.logits(hidden[sequence.ids == v.mask])
        assert (logits - expected[:, v.image_start : v.image_end]).abs().max() < 1e-4
        done += len(logits)
    assert len(seen) == steps and done == 16


def test_the_best_of_the_candidates_is_kept(model: Model) -> None:
    three = replace(MASKED, steps=3)
    best_of_three = replace(three, candidates=3)
    repeated = [text for text in TEXTS for _ in range(3)]
    candidates = draw_codes(model, repeated, three)
    likelihoods = text_likelihoods(model, candidates, repeated)
    assert len(set(likelihoods.tolist())) == 6
    best = candidates.view(2, 3, 16)[[0, 1], likelihoods.view(2, 3).argmax(1)]
    assert torch.equal(draw_codes(model, TEXTS, best_of_three), best)
    first = draw_codes(model, TEXTS[:1], best_of_three)
    assert torch.equal(first, best[:1]), "whatever is drawn beside it"
    known = torch.full((2, 16), -1)
    known[:, 5] = 7
    assert draw_codes(model, TEXTS, best_of_three, known=known)[:, 5].tolist() == [7, 7]
    with pytest.raises(ValueError, match="candidates=0"):
        draw_codes(model, TEXTS, replace(MASKED, candidates=0))


def test_known_codes_stay_and_are_spread_over_the_image(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    forward = model.network.transformer.forward

    def spy(ids: Tensor, *others: Any, **more: Any) -> Tensor:
        seen.append(ids.clone())
        return forward(ids, *others, **more)

    monkeypatch.setattr(model.network.transformer, "forward", spy)
    codes = draw_codes(model, ["a red bus"], replace(MASKED, steps=8, guidance_scale=1))
    v = model.vocabulary
    assert seen.pop(0).tolist()[0][-1] == v.boi, "the text is read once, and first"
    counts = [int((ids != v.mask).sum()) for ids in seen]
    cosine = [int(16 * np.cos(step / 8 * np.pi / 2)) for step in range(1, 8)]
    assert counts == [0, *(max(1, 16 - left) for left in cosine)]
    masks = [int((ids == v.mask).sum()) for ids in seen]
    assert masks == [b - a for a, b in pairwise([*counts, 16])], "other codes are not read"
    order = spread_order(4)
    for ids, count in zip(seen, counts, strict=True):
        known = codes[0, order < count] + v.image_start
        assert ids[ids != v.mask].tolist() == known.tolist(), "the first ones of the order"


def test_watching_a_drawing_does_not_change_it(model: Model) -> None:
    """Unwatched, a step reads only codes that are known or predicted. Here each row has another
    number of them."""
    known = torch.full((2, 16), UNKNOWN)
    known[1, :9] = torch.arange(9)
    options = replace(MASKED, steps=5)
    seen: list[Tensor] = []
    texts = ["a red bus", "two dogs"]
    codes = draw_codes(
        model, texts, options, known=known, on_step=lambda _, codes: seen.append(codes)
    )
    assert len(seen) == 5 and torch.equal(seen[-1], codes)
    assert torch.equal(codes, draw_codes(model, texts, options, known=known))
    for row, text in enumerate(texts):
        alone = draw_codes(model, [text], options, known=known[row : row + 1], numbers=[row])
        assert torch.equal(alone[0], codes[row])
    assert (seen[0] != UNKNOWN).all(), "undrawn codes are shown as their argmax"


class Asked(TorchFunctionMode):
    """Notes what the host asks of tensors that are marked ``there``, and of what comes of them.

    A host has to wait for a GPU to answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, result = getattr(func, "__name__", ""), func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(getattr(x, "there", False) for x in given):
            return result
        masked = name == "__getitem__" and any(x.dtype == torch.bool for x in given)
        if masked or name in ("__bool__", "cpu", "item", "nonzero", "numpy", "tolist"):
            self.names.append(name)
        if name == "cpu":
            return result.clone()
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                x.there = True  # type: ignore[attr-defined]
        return result


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_stay_on_a_device_and_the_host_waits_once_a_step_at_most(
    model: Model, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The one question of a step is whether the scores are numbers. At the end it takes codes."""
    forward = DecodeBatch.forward_block

    def there(*arguments: Any) -> Tensor:
        hidden = forward(*arguments)
        hidden.there = True  # type: ignore[attr-defined]
        return hidden

    monkeypatch.setattr(DecodeBatch, "forward_block", there)
    with Asked() as asked:
        draw_codes(model, TEXTS, replace(MASKED, steps=5, temperature=temperature))
    assert asked.names == [*["__bool__"] * (5 if temperature else 0), "cpu"]


def test_drawings_that_are_chosen_together_are_those_of_each_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(MASKED, steps=4, temperature=1.0)
    together = draw_codes(model, TEXTS * 3, options)
    monkeypatch.setattr("multimodal.inference.drawing.SCORES_AT_ONCE", 1)
    assert torch.equal(draw_codes(model, TEXTS * 3, options), together)
    assert len(set(map(str, together.tolist()))) == 6


@pytest.mark.parametrize("side", [1, 4, 8, 14, 32])
def test_the_order_of_drawing_keeps_neighbours_apart(side: int) -> None:
    order = spread_order(side)
    assert sorted(order.tolist()) == list(range(side * side))
    quarter = (order < side * side / 4).view(side, side).float()
    if side >= 8:  # the first quarter of the codes is in every corner of the image
        halves = quarter.unflatten(0, (2, side // 2)).unflatten(2, (2, side // 2)).sum((1, 3))
        assert halves.min() >= 0.6 * halves.max()
