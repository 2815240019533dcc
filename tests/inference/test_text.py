"""The grammar holds for any weights; drawing is seeded, guided, complete."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multimodal.api import Model
from multimodal.data.images import to_image
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.drawing import UNKNOWN, decode_images, draw_codes, spread_order
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.inference.text import (
    caption_codes,
    encode_images,
    generate_ids,
    read_images,
)
from multimodal.model.sequences import describe_prompt, draw, pack
from multimodal.options import Sampling
from tests.prompts import prompts_of

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


# --- text -----------------------------------------------------------------------------------------


def test_text_never_leaves_the_text(tiny_model: Make) -> None:
    """However much a model would rather speak in specials, codes or padding."""
    untied = tiny_model(noise=0.1, tied=False)
    v = untied.vocabulary
    allowed = set(range(v.text_size))
    with torch.no_grad():
        # Ids outside the text get huge logits of either sign, as the state turns.
        untied.network.transformer.lm_head.weight[v.text_size :] *= 100
    for text in generate_ids(untied, prompts_of(untied), 20):
        assert set(text) <= allowed
    free = untied.network.transformer.logits(torch.randn(50, 64)).argmax(-1)
    assert (free >= v.text_size).float().mean() > 0.8, "without the grammar they would be drawn"


def test_text_is_the_argmax_of_the_full_forward_and_ends_at_eos(tiny_model: Make) -> None:
    model = tiny_model(noise=0.1, tied=False)
    v, prompts = model.vocabulary, prompts_of(model)
    before = generate_ids(model, prompts, 12)
    with torch.no_grad():  # <eos> is what the first one says at its third place
        model.network.transformer.lm_head.weight[v.eos] = model.network.transformer.lm_head.weight[
            before[0][2]
        ]
        model.network.transformer.lm_head.weight[before[0][2]] = 0
    texts = generate_ids(model, prompts, 12)
    lengths = {len(text) for text in texts}
    assert min(lengths) < 12 and len(lengths) > 1, "some end early, not all"
    for prompt, text in zip(prompts, texts, strict=True):
        whole = [*prompt, *text]
        packed = pack([draw(v, whole)], len(whole) + 2, v.pad)  # its own <bos> comes first
        packed.ids[0, : len(whole)] = torch.tensor(whole)
        with torch.inference_mode():
            logits = model.network.transformer.logits(model.network.hidden(packed)[0])
        ids = torch.arange(v.size)
        allowed = (ids < v.text_size) | (ids == v.eos)
        spoken = logits.where(allowed, -torch.inf).argmax(-1)[len(prompt) - 1 : len(whole)].tolist()
        assert spoken[: len(text)] == text
        assert (spoken[-1] == v.eos) == (len(text) < 12)


def test_a_batch_is_each_prompt_alone(model: Model) -> None:
    prompts = prompts_of(model)
    together = generate_ids(model, prompts, 16)
    assert together == [generate_ids(model, [prompt], 16)[0] for prompt in prompts]
    assert together[::-1] == generate_ids(model, prompts[::-1], 16)
    assert len({tuple(text) for text in together}) > 3


def test_a_text_ends_before_what_it_is_to_stop_at(model: Model) -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (4, 16)))
    whole = caption_codes(model, codes, 24)
    stops = [text[5:8] for text in whole]
    cut = caption_codes(model, codes, 24, stop=stops)
    first = [min(text.find(one) for one in stops if one in text) for text in whole]
    assert cut == [text[:end].strip() for text, end in zip(whole, first, strict=True)]
    assert any(len(one) < len(text) for one, text in zip(cut, whole, strict=True))
    image = to_image(decode_images(model, codes[:1])[0])
    assert model.caption([image], max_tokens=24, stop=["never said"]) == model.caption(
        [image], max_tokens=24
    )
    for wrong in ("a", [""]):
        with pytest.raises(ValueError, match="expected a list of texts, none of them empty"):
            model.caption([image], stop=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_validation_samples_in_mixed_precision(model: Model, kind: torch.dtype) -> None:
    """Weights and cache in fp32, products in less: what a run does between its steps."""
    prompts = prompts_of(model)
    exact = generate_ids(model, prompts, 16)
    with torch.autocast("cpu", kind):
        texts = generate_ids(model, prompts, 16)
        drawn = draw_codes(model, ["a red bus"], method="causal")
    assert [text[0] for text in texts] == [text[0] for text in exact]
    assert drawn.shape == (1, 16)


def test_more_text_than_positions_is_an_error(model: Model) -> None:
    with pytest.raises(ValueError, match="max_tokens=0: expected at least 1"):
        generate_ids(model, [[1, 2, 3]], 0)
    with pytest.raises(ValueError, match="3 tokens and 4094 more: the model reads at most 4096"):
        generate_ids(model, [[1, 2, 3]], 4094)
    assert generate_ids(model, [[1, 2, 3]], 1) == [generate_ids(model, [[1, 2, 3]], 9)[0][:1]]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for shape in ((32, 32, 3), (9, 40, 3), (64, 8, 3), (5, 5, 3), (33, 31, 3))
    ]


def test_captions_do_not_depend_on_the_batch(model: Model, tmp_path: Path) -> None:
    images = pictures()
    pixels = read_images(model, images)
    codes = encode_images(model, pixels)
    for row in range(len(images)):
        assert (encode_images(model, pixels[row : row + 1])[0] == codes[row]).all()
    captions = model.caption(images, max_tokens=12)
    assert captions == caption_codes(model, codes, 12)
    assert captions == [model.caption([image], max_tokens=12)[0] for image in images]
    assert captions == model.caption(images, batch_size=2, max_tokens=12)
    assert len(set(captions)) > 1
    images[1].save(tmp_path / "one.png")
    assert model.caption([tmp_path / "one.png"], max_tokens=12) == [captions[1]]
    assert model.caption([]) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        model.caption(images, batch_size=0)


# --- drawing --------------------------------------------------------------------------------------


def test_a_drawing_has_all_its_codes(model: Model) -> None:
    for steps in (1, 2, 5, 16, 40):
        codes = draw_codes(model, ["a red bus", "two dogs run on the beach"], steps=steps)
        assert codes.shape == (2, 16) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < 64
    images = decode_images(model, codes)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1


def test_the_same_seed_draws_the_same(model: Model) -> None:
    texts = ["a red bus", "two dogs"]
    first = draw_codes(model, texts, sampling=Sampling(1.0, seed=3))
    torch.manual_seed(99)  # the global state has no part in it
    assert torch.equal(first, draw_codes(model, texts, sampling=Sampling(1.0, seed=3)))
    assert not torch.equal(first, draw_codes(model, texts, sampling=Sampling(1.0, seed=4)))
    cold = draw_codes(model, texts, sampling=Sampling(seed=3))
    assert torch.equal(cold, draw_codes(model, texts, sampling=Sampling(seed=4)))


def test_guidance(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 is none and costs no second row; 0 ignores the text; near 1 is nearly none."""
    rows: list[int] = []
    logits = type(model.network.transformer).logits

    def counted(self: object, hidden: Tensor, ids: slice) -> Tensor:
        rows.append(len(hidden))
        return logits(self, hidden, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.network.transformer), "logits", counted)
    texts = ["a red bus", "two dogs run on the beach"]
    plain = draw_codes(model, texts, guidance_scale=1, steps=6)
    assert sum(rows) == 2 * 16, "each code once"
    assert torch.equal(plain, draw_codes(model, texts, guidance_scale=1 + 1e-6, steps=6))
    assert sum(rows) == 2 * 16 + 4 * 16
    assert not torch.equal(plain, draw_codes(model, texts, guidance_scale=4, steps=6))
    unconditional = draw_codes(model, texts, guidance_scale=0, steps=6)
    assert not torch.equal(plain, unconditional)
    assert torch.equal(unconditional, draw_codes(model, texts[::-1], guidance_scale=0, steps=6))


def test_the_text_matters_and_its_neighbours_do_not(model: Model) -> None:
    cold = {"sampling": Sampling(), "steps": 6}
    a, b = draw_codes(model, ["a red bus", "two dogs run on the beach"], **cold)  # type: ignore[arg-type]
    assert not torch.equal(a, b)
    assert torch.equal(a, draw_codes(model, ["a red bus"], **cold)[0])  # type: ignore[arg-type]
    assert torch.equal(b, draw_codes(model, ["two dogs run on the beach"], **cold)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 5])
def test_a_cold_step_is_the_prediction_that_training_learns(
    model: Model, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """What is asked for and what is known, in the sequence and with the attention of ``draw``."""
    v, text = model.vocabulary, model.text_tokenizer.encode("a red bus")
    seen: list[Tensor] = []
    monkeypatch.setattr(Sampling, "choose", lambda _, logits, __: (
        seen.append(logits[0]), logits.argmax(-1))[1])  # fmt: skip
    codes = draw_codes(model, ["a red bus"], steps=steps, guidance_scale=1)[0].numpy()
    order, done = spread_order(4).numpy(), 0
    for logits in seen:
        asked = (order >= done) & (order < done + len(logits))
        sequence = draw(v, text, np.where(order < done, codes, 0), asked, order < done)
        assert len(sequence) == sequence.state + 1 + done + len(logits)
        with torch.inference_mode():
            hidden = model.network.hidden(pack([sequence], 60, v.pad))[0, : len(sequence)]
            expected = model.network.transformer.logits(hidden[sequence.ids == v.mask])
        assert (logits - expected[:, v.image_start : v.image_end]).abs().max() < 1e-4
        done += len(logits)
    assert len(seen) == steps and done == 16


def test_likelihoods_are_those_of_reading_token_by_token(model: Model) -> None:
    v, texts = model.vocabulary, ["a red bus", "two dogs run on the beach near a tree", "dogs"]
    codes = torch.randint(v.codebook_size, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = []
    for row, text in zip((codes + v.image_start).tolist(), texts, strict=True):
        total, ids = 0.0, [*model.text_tokenizer.encode(text), v.eos]
        with torch.inference_mode():
            batch = DecodeBatch(model.network, [describe_prompt(v, row)], len(ids))
            for token in ids:
                total += float(batch.logits().log_softmax(-1)[0, token])
                batch.step(torch.tensor([token]))
        expected.append(total)
    assert text_likelihoods(model, codes, texts).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_best_of_the_candidates_is_kept(model: Model) -> None:
    texts = ["a red bus", "two dogs run on the beach"]
    every = draw_codes(model, [text for text in texts for _ in range(3)], steps=3)
    likely = text_likelihoods(model, every, [text for text in texts for _ in range(3)])
    assert len(set(likely.tolist())) == 6
    best = every.view(2, 3, 16)[[0, 1], likely.view(2, 3).argmax(1)]
    assert torch.equal(draw_codes(model, texts, steps=3, candidates=3), best)
    first = draw_codes(model, texts[:1], steps=3, candidates=3)
    assert torch.equal(first, best[:1]), "whatever else is drawn beside it"
    known = torch.full((2, 16), -1)
    known[:, 5] = 7
    assert draw_codes(model, texts, steps=3, candidates=3, known=known)[:, 5].tolist() == [7, 7]
    with pytest.raises(ValueError, match="candidates=0"):
        draw_codes(model, texts, candidates=0)


def test_what_is_kept_stays_and_is_spread_over_the_image(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        model.network.transformer,
        "forward",
        lambda ids, *rest, **more: (seen.append(ids.clone()), type(model.network.transformer).forward(
            model.network.transformer, ids, *rest, **more))[1],
    )  # fmt: skip
    codes = draw_codes(model, ["a red bus"], steps=8, guidance_scale=1)
    v = model.vocabulary
    assert seen.pop(0).tolist()[0][-1] == v.boi, "the text is read once, and first"
    counts = [int((ids != v.mask).sum()) for ids in seen]
    cosine = [int(16 * np.cos(step / 8 * np.pi / 2)) for step in range(1, 8)]
    assert counts == [0, *(max(1, 16 - left) for left in cosine)]
    asked = [int((ids == v.mask).sum()) for ids in seen]
    assert asked == [b - a for a, b in pairwise([*counts, 16])], "what is left out is not read"
    order = spread_order(4)
    for ids, count in zip(seen, counts, strict=True):
        known = codes[0, order < count] + v.image_start
        assert ids[ids != v.mask].tolist() == known.tolist(), "the first ones of the order"


def test_who_watches_a_drawing_changes_nothing(model: Model) -> None:
    """Unwatched, nothing is read but what is known and what is asked for: here other numbers of
    codes in each row."""
    known = torch.full((2, 16), UNKNOWN)
    known[1, :9] = torch.arange(9)
    options: Any = {"method": "masked", "steps": 5, "known": known}
    seen: list[torch.Tensor] = []
    texts = ["a red bus", "two dogs"]
    drawn = draw_codes(model, texts, on_step=lambda _, codes: seen.append(codes), **options)
    assert len(seen) == 5 and torch.equal(seen[-1], drawn)
    assert torch.equal(drawn, draw_codes(model, texts, **options))
    for row, text in enumerate(texts):
        alone = {**options, "known": known[row : row + 1], "numbers": [row]}
        assert torch.equal(draw_codes(model, [text], **alone)[0], drawn[row])
    assert (seen[0] != UNKNOWN).all(), "what is not drawn yet is shown as it is likeliest"


@pytest.mark.parametrize("side", [1, 4, 8, 14, 32])
def test_the_order_of_drawing_keeps_neighbours_apart(side: int) -> None:
    order = spread_order(side)
    assert sorted(order.tolist()) == list(range(side * side))
    quarter = (order < side * side / 4).view(side, side).float()
    if side >= 8:  # of the first quarter, every corner of the image has its share
        halves = quarter.unflatten(0, (2, side // 2)).unflatten(2, (2, side // 2)).sum((1, 3))
        assert halves.min() >= 0.6 * halves.max()


# --- what prompts have in common ------------------------------------------------------------------


def test_a_common_beginning_is_read_once_and_changes_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, encode = model.vocabulary, model.text_tokenizer.encode
    image = [v.image_start + n for n in range(16)]
    prompts = [
        describe_prompt(v, image) + encode(text)
        for text in ("is it?", "a red", "two dogs run on the beach and", "is it a bus?")
    ]
    reads: list[tuple[int, int]] = []
    forward = model.network.transformer.forward

    def counting(ids: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        reads.append(tuple(ids.shape))  # type: ignore[arg-type]
        return forward(ids, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model.network.transformer, "forward", counting)
    batch = DecodeBatch(model.network, prompts, 5)
    assert reads[0] == (1, 19) and reads[1][0] == 4  # the image once, then four questions
    together, logits = generate_ids(model, prompts, 12), batch.logits()
    batch.step(torch.tensor([3, 4, 5, 6]))
    after = batch.logits()
    monkeypatch.setattr("multimodal.inference.batch.SHARED_AT_LEAST", 10**9)
    reads.clear()
    apart = DecodeBatch(model.network, prompts, 5)
    assert len(reads) == 1
    assert (logits - apart.logits()).abs().max() < 1e-4
    apart.read(torch.tensor([3, 4, 5, 6]))
    assert (after - apart.logits()).abs().max() < 1e-4
    assert together == generate_ids(model, prompts, 12)


def test_examples_stand_before_the_image(model: Model) -> None:
    images = pictures()
    v, encode = model.vocabulary, model.text_tokenizer.encode
    codes = encode_images(model, read_images(model, images)) + v.image_start
    examples = [(images[0], "a red bus"), (images[1], "two dogs")]
    found = model.caption(images[2:], examples=examples, max_tokens=12)
    begun = [v.bos, v.boi, *codes[0].tolist(), v.eoi, *encode("a red bus")]
    begun += [v.boi, *codes[1].tolist(), v.eoi, *encode("two dogs")]
    for image, caption in zip(codes[2:].tolist(), found, strict=True):
        (ids,) = generate_ids(model, [[*begun, v.boi, *image, v.eoi]], 12)
        assert caption == model.text_tokenizer.decode(ids).strip()
    assert found != model.caption(images[2:], max_tokens=12)
    with pytest.raises(ValueError, match="the text is empty"):
        model.caption(images[2:], examples=[(images[0], " ")])


def test_the_kept_candidate_is_the_nearest(model: Model) -> None:
    images, hot = pictures(), {"temperature": 1.0, "max_tokens": 8}
    kept = model.caption(images, candidates=5, **hot)  # type: ignore[arg-type]
    assert kept == model.caption(images, candidates=5, batch_size=2, **hot)  # type: ignore[arg-type]
    codes = encode_images(model, read_images(model, images))
    for row, caption in enumerate(kept):
        sampling = Sampling(temperature=1.0)
        every = caption_codes(
            model, codes[row].expand(5, -1), 8, sampling, range(5 * row, 5 * row + 5)
        )
        image, texts = model.embed(images=[images[row]])[0], [text for text in every if text]
        assert caption == texts[int((model.embed(texts=texts) @ image).argmax())]
    with pytest.raises(ValueError, match="and a temperature above 0"):
        model.caption(images, candidates=5)
