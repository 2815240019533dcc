"""Texts: the grammar, the greedy text, stops, limits, captions, examples and likelihoods."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.api import Model
from multimodal.data.images import to_image
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.codec import decode_images, encode_images, read_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.inference.text import caption_codes, generate_ids
from multimodal.model.sequences import describe_prompt, draw, pack
from multimodal.options import DrawOptions, TextOptions
from tests.prompts import prompts_of

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


# --- text -----------------------------------------------------------------------------------------


def test_text_never_leaves_the_text(tiny_model: Make) -> None:
    """Even where specials, codes or padding are the most likely ids."""
    untied = tiny_model(noise=0.1, tied=False)
    v = untied.vocabulary
    allowed = set(range(v.text_size))
    with torch.no_grad():
        # Ids outside the text get huge logits, whose sign depends on the state.
        untied.network.transformer.lm_head.weight[v.text_size :] *= 100
    for text in generate_ids(untied, prompts_of(untied), TextOptions(max_tokens=20)):
        assert set(text) <= allowed
    free = untied.network.transformer.logits(torch.randn(50, 64)).argmax(-1)
    assert (free >= v.text_size).float().mean() > 0.8, "without the grammar they would be chosen"


def test_text_is_the_argmax_of_the_full_forward_and_ends_at_eos(tiny_model: Make) -> None:
    model = tiny_model(noise=0.1, tied=False)
    v, prompts, options = model.vocabulary, prompts_of(model), TextOptions(max_tokens=12)
    (_, _, third, *_), *_ = generate_ids(model, prompts, options)
    with torch.no_grad():  # <eos> takes the place of the third token of the first text
        weights = model.network.transformer.lm_head.weight
        weights[v.eos] = weights[third]
        weights[third] = 0
    texts = generate_ids(model, prompts, options)
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
        best = logits.where(allowed, -torch.inf).argmax(-1)[len(prompt) - 1 : len(whole)].tolist()
        assert best[: len(text)] == text
        assert (best[-1] == v.eos) == (len(text) < 12)


def test_a_batch_is_each_prompt_alone(model: Model) -> None:
    prompts, options = prompts_of(model), TextOptions(max_tokens=16)
    together = generate_ids(model, prompts, options)
    assert together == [generate_ids(model, [prompt], options)[0] for prompt in prompts]
    assert together[::-1] == generate_ids(model, prompts[::-1], options)
    assert len({tuple(text) for text in together}) > 3


def test_a_text_ends_before_a_stop_text(model: Model) -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (4, 16)))
    whole = caption_codes(model, codes, TextOptions(max_tokens=24))
    stops = tuple(text[5:8] for text in whole)
    short = caption_codes(model, codes, TextOptions(max_tokens=24, stop=stops))
    ends = [min(text.find(stop) for stop in stops if stop in text) for text in whole]
    assert short == [text[:end].strip() for text, end in zip(whole, ends, strict=True)]
    assert any(len(a) < len(b) for a, b in zip(short, whole, strict=True))
    image = to_image(decode_images(model, codes[:1])[0])
    assert model.caption([image], max_tokens=24, stop=["not in it"]) == model.caption(
        [image], max_tokens=24
    )
    for wrong in ("a", [""]):
        with pytest.raises(ValueError, match="expected a list"):
            model.caption([image], stop=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_texts_and_drawings_in_mixed_precision(model: Model, kind: torch.dtype) -> None:
    """As in the validation of a run: weights and cache in fp32, products in less."""
    prompts, options = prompts_of(model), TextOptions(max_tokens=16)
    exact = generate_ids(model, prompts, options)
    with torch.autocast("cpu", kind):
        texts = generate_ids(model, prompts, options)
        codes = draw_codes(model, ["a red bus"], DrawOptions(method="causal"))
    assert [text[0] for text in texts] == [text[0] for text in exact]
    assert codes.shape == (1, 16)


def test_more_text_than_positions_is_an_error(model: Model) -> None:
    def generate(max_tokens: int) -> list[list[int]]:
        return generate_ids(model, [[1, 2, 3]], TextOptions(max_tokens=max_tokens))

    with pytest.raises(ValueError, match="max_tokens=0: expected at least 1"):
        generate(0)
    with pytest.raises(ValueError, match="3 tokens and 4094 more: the model reads at most 4096"):
        generate(4094)
    assert generate(1) == [generate(9)[0][:1]]


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
    assert captions == caption_codes(model, codes, TextOptions(max_tokens=12))
    assert captions == [model.caption([image], max_tokens=12)[0] for image in images]
    assert captions == model.caption(images, batch_size=2, max_tokens=12)
    assert len(set(captions)) > 1
    images[1].save(tmp_path / "one.png")
    assert model.caption([tmp_path / "one.png"], max_tokens=12) == [captions[1]]
    assert model.caption([]) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        model.caption(images, batch_size=0)


# --- likelihoods ---------------------------------------------------------------------------------


def test_likelihoods_are_those_of_reading_token_by_token(model: Model) -> None:
    v, texts = model.vocabulary, ["a red bus", "two dogs run on the beach near a tree", "dogs"]
    codes = torch.randint(v.codebook_size, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = []
    for row, text in zip(codes.tolist(), texts, strict=True):
        total, ids = 0.0, [*model.text_tokenizer.encode(text), v.eos]
        with torch.inference_mode():
            batch = DecodeBatch(model.network, [describe_prompt(v, row)], len(ids))
            for token in ids:
                total += float(batch.logits().log_softmax(-1)[0, token])
                batch.step(torch.tensor([token]))
        expected.append(total)
    assert text_likelihoods(model, codes, texts).tolist() == pytest.approx(expected, rel=1e-4)


# --- what prompts have in common ------------------------------------------------------------------


def test_a_common_beginning_is_read_once_and_changes_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, encode = model.vocabulary, model.text_tokenizer.encode
    prompts = [
        describe_prompt(v, range(16)) + encode(text)
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
    options = TextOptions(max_tokens=12)
    together, logits = generate_ids(model, prompts, options), batch.logits()
    batch.step(torch.tensor([3, 4, 5, 6]))
    after = batch.logits()
    monkeypatch.setattr("multimodal.inference.batch.MIN_SHARED", 10**9)
    reads.clear()
    apart = DecodeBatch(model.network, prompts, 5)
    assert len(reads) == 1
    assert (logits - apart.logits()).abs().max() < 1e-4
    apart.step(torch.tensor([3, 4, 5, 6]))
    assert (after - apart.logits()).abs().max() < 1e-4
    assert together == generate_ids(model, prompts, options)


def test_examples_stand_before_the_image(model: Model) -> None:
    images = pictures()
    v, encode = model.vocabulary, model.text_tokenizer.encode
    ids = encode_images(model, read_images(model, images)) + v.image_start
    examples = [(images[0], "a red bus"), (images[1], "two dogs")]
    captions = model.caption(images[2:], examples=examples, max_tokens=12)
    begin = [v.bos, v.boi, *ids[0].tolist(), v.eoi, *encode("a red bus")]
    begin += [v.boi, *ids[1].tolist(), v.eoi, *encode("two dogs")]
    for image, caption in zip(ids[2:].tolist(), captions, strict=True):
        prompt = [*begin, v.boi, *image, v.eoi]
        (text,) = generate_ids(model, [prompt], TextOptions(max_tokens=12))
        assert caption == model.text_tokenizer.decode(text).strip()
    assert captions != model.caption(images[2:], max_tokens=12)
    with pytest.raises(ValueError, match="the text is empty"):
        model.caption(images[2:], examples=[(images[0], " ")])


def test_the_caption_is_the_nearest_of_its_candidates(model: Model) -> None:
    images, hot = pictures(), {"temperature": 1.0, "max_tokens": 8}
    captions = model.caption(images, candidates=5, **hot)  # type: ignore[arg-type]
    assert captions == model.caption(images, candidates=5, batch_size=2, **hot)  # type: ignore[arg-type]
    codes = encode_images(model, read_images(model, images))
    for row, caption in enumerate(captions):
        options = TextOptions(temperature=1.0, max_tokens=8)
        numbers = range(5 * row, 5 * row + 5)
        candidates = caption_codes(model, codes[row].expand(5, -1), options, numbers)
        image, texts = model.embed(images=[images[row]])[0], [text for text in candidates if text]
        assert caption == texts[int((model.embed(texts=texts) @ image).argmax())]
    with pytest.raises(ValueError, match="and a temperature above 0"):
        model.caption(images, candidates=5)
