"""The one loop that decodes: rows come and go, and each is the same as alone."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch, compact_rows
from multimodal.inference.decode import decode
from multimodal.inference.drawing import ImageRow, draw_codes
from multimodal.inference.mixed import Reply
from multimodal.inference.text import generate_ids
from multimodal.model.sequences import draw_prompt
from multimodal.options import DrawOptions, EditOptions, TextOptions
from tests.prompts import prompts_of

Make = Callable[..., Model]
RowT = TypeVar("RowT", bound=ImageRow)
TEXTS = (
    "a red bus",
    "two dogs run on the beach",
    "the cat",
    "a",
    "a small blue circle in the snow",
)


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


# --- rows of text ---------------------------------------------------------------------------------


def test_rows_that_are_done_make_room_for_others(tiny_model: Make) -> None:
    """Prompts have different lengths, and some texts end early. Each has its random numbers."""
    eager = tiny_model(noise=0.1, tied=False)
    prompts = prompts_of(eager, 11) + [[1, 2, 3], [4] * 40]
    logits = eager.network.transformer.logits

    def ending(hidden: Tensor, ids: slice) -> Tensor:
        """<eos> comes when a dimension of the state says so."""
        scores = logits(hidden, ids)
        scores[:, eager.vocabulary.eos] += 9 * hidden[:, 0]
        return scores

    eager.network.transformer.logits = ending  # type: ignore[method-assign]
    greedy, hot = TextOptions(max_tokens=16), TextOptions(max_tokens=16, temperature=1.0, seed=2)
    for options in (greedy, hot):
        together = generate_ids(eager, prompts, options)
        assert len({len(text) for text in together}) > 2, "some rows make room early"
        for size in (1, 2, 4, 12):
            assert generate_ids(eager, prompts, options, batch_size=size) == together
    eager.network.transformer.logits = logits  # type: ignore[method-assign]
    beams = TextOptions(beams=3, max_tokens=6)
    searched = generate_ids(eager, prompts, beams)
    assert generate_ids(eager, prompts, beams, batch_size=4) == searched


def test_the_last_rows_move_into_the_holes() -> None:
    assert compact_rows([0, 1, 2]) == [0, 1, 2] and compact_rows([]) == []
    assert compact_rows([1, 3, 4]) == [4, 1, 3]
    assert compact_rows([2, 5, 6, 0]) == [0, 6, 2, 5]


@pytest.mark.parametrize("kept", [[4, 1, 3], [0], [2, 2, 0], [5, 4, 3, 2, 1, 0], [1] * 9])
def test_kept_rows_continue_as_if_they_were_alone(tiny_model: Make, kept: list[int]) -> None:
    model = tiny_model(noise=0.1)
    prompts, ids = prompts_of(model), torch.tensor([7, 8])
    with torch.inference_mode():
        batch = DecodeBatch(model.network, prompts, 4)
        batch.step(ids[:1].expand(6))
        batch.keep(torch.tensor(kept))
        batch.step(ids[1:].expand(len(kept)))
        for row, number in enumerate(kept):
            alone = DecodeBatch(model.network, [prompts[number]], 4)
            for token in ids:
                alone.step(token[None])
            assert (batch.logits()[row] - alone.logits()[0]).abs().max() < 1e-5


# --- rows of images -------------------------------------------------------------------------------


class ScoredRow(ImageRow):
    """An image that keeps the log probability of each code."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scores: list[float] = []

    def take(self, token: int, log_probability: float = 0.0) -> Iterator[Tensor]:
        self.scores.append(log_probability)
        yield from super().take(token, log_probability)


class ShortRow(ImageRow):
    """An image that is done after ``3 + number`` codes."""

    def take(self, token: int, log_probability: float = 0.0) -> Iterator[Tensor]:
        yield from super().take(token, log_probability)
        self.done = len(self.codes) == 3 + self.number


def image_rows(model: Model, options: EditOptions, kind: type[RowT]) -> list[RowT]:
    """A row for each text. With guidance, it has a second prompt, without the text."""
    rows = []
    for number, text in enumerate(TEXTS):
        prompts = [draw_prompt(model.vocabulary, model.text_tokenizer.encode(text))]
        if options.guidance_scale != 1:
            prompts.append(draw_prompt(model.vocabulary, None))
        rows.append(kind(model, number, prompts, options))
    return rows


def draw_rows(model: Model, options: EditOptions, batch_size: int) -> list[list[int]]:
    rows = image_rows(model, options, ImageRow)
    for _ in decode(model.network, rows, options, batch_size=batch_size):
        pass
    assert all(len(row.codes) == 16 and row.done for row in rows)
    return [row.codes for row in rows]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("schedule", ["constant", "rising"])
def test_images_are_the_same_in_any_batch(
    model: Model, guidance_scale: float, schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others take the places of images that are done. With guidance each has two prompts."""
    options = EditOptions(guidance_scale=guidance_scale, guidance_schedule=schedule, seed=4)
    together = draw_rows(model, options, 0)
    assert len({tuple(codes) for codes in together}) == len(TEXTS)
    for size in (1, 2, 3):
        assert draw_rows(model, options, size) == together
    monkeypatch.setattr("multimodal.inference.drawing.DRAWINGS_AT_ONCE", 2)
    drawing = DrawOptions(**vars(options), method="causal")
    assert draw_codes(model, TEXTS, drawing).tolist() == together


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guided_rows_of_different_lengths_refill(model: Model, guidance_scale: float) -> None:
    """Rows join while others are in the middle: each keeps its own two prompts."""
    options = EditOptions(guidance_scale=guidance_scale, guidance_schedule="rising", seed=1)
    whole = draw_rows(model, options, 0)
    for size in (1, 2, 3, 5):
        rows = image_rows(model, options, ShortRow)
        steps = len(list(decode(model.network, rows, options, batch_size=size)))
        lengths = [3 + row.number for row in rows]
        assert max(lengths) <= steps <= sum(lengths)
        assert steps < sum(lengths) or size == 1
        for row, codes in zip(rows, whole, strict=True):
            assert row.codes == codes[: 3 + row.number]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [0, 2])
def test_log_probabilities_of_codes_are_those_of_a_full_forward(
    model: Model, temperature: float, batch_size: int
) -> None:
    v, transformer = model.vocabulary, model.network.transformer
    options = EditOptions(guidance_scale=1, temperature=temperature)
    rows = image_rows(model, options, ScoredRow)
    loop = decode(model.network, rows, options, batch_size=batch_size, log_probabilities=True)
    for _ in loop:
        pass
    for row in rows:
        (prompt,) = row.prompts
        codes = torch.tensor(row.codes)
        ids = torch.tensor([[*prompt, *(codes + v.image_start).tolist()]])
        length = ids.shape[1]
        causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with torch.inference_mode():
            hidden = transformer(ids, torch.arange(length)[None], causal)
            logits = transformer.logits(hidden, slice(v.image_start, v.image_end))[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, codes[:, None])[:, 0]
        assert row.scores == pytest.approx(expected.tolist(), abs=1e-4)


# --- rows of texts and images ---------------------------------------------------------------------


def parts_of(reply: Reply | ValueError) -> list[str | bytes]:
    assert isinstance(reply, Reply)
    return [part if isinstance(part, str) else part.tobytes() for part in reply.parts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mixed_rows_are_the_same_in_any_batch(tiny_model: Make, temperature: float) -> None:
    """Texts that end early make room for others, while their neighbours draw."""
    eager = tiny_model(seed=3, noise=0.1, tied=False)
    v, logits = eager.vocabulary, eager.network.transformer.logits

    def with_images(hidden: Tensor, *ids: slice) -> Tensor:
        """Images begin and texts end where the state says so."""
        scores = logits(hidden, *ids)
        scores[..., v.boi] += 9 * hidden[:, 1]
        scores[..., v.eos] += 9 * hidden[:, 0]
        return scores

    eager.network.transformer.logits = with_images  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    prompts: list[list[str | Image.Image]] = [[text] for text in TEXTS]
    prompts += [[image, "a"] for image in images]
    options: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "seed": 2}
    together = eager.reply(prompts, output="any", batch_size=len(prompts), **options)
    totals = {r.text_tokens + r.image_tokens for r in together if isinstance(r, Reply)}
    assert len(totals) > 3, "some rows make room early"
    parts = [part for r in together if isinstance(r, Reply) for part in r.parts]
    assert {type(part) for part in parts} == {str, Image.Image}
    for size in (1, 2, 3):
        refilled = eager.reply(prompts, output="any", batch_size=size, **options)
        for reply, expected in zip(refilled, together, strict=True):
            assert parts_of(reply) == parts_of(expected)
            assert isinstance(reply, Reply) and isinstance(expected, Reply)
            for name in ("prompt_tokens", "text_tokens", "image_tokens", "ended"):
                assert getattr(reply, name) == getattr(expected, name)
            assert reply.log_probability == pytest.approx(expected.log_probability, abs=1e-2)
