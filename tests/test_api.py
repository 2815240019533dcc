"""What a person does with a model in Python: ask, draw, edit, embed, and mix texts and images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.api import Model, load
from multimodal.data.formats.folders import list_images
from multimodal.data.images import Fit, fit_image, to_tensor
from multimodal.inference.codec import UNKNOWN, encode_images, read_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.editing import box_mask, edit_image, masked_codes
from multimodal.inference.embedding import EmbeddingCache, embed_files
from multimodal.inference.mixed import prompt_ids
from multimodal.inference.text import generate_ids
from multimodal.model.sequences import describe_prompt, draw_prompt, pack
from multimodal.model.templates import Templates
from multimodal.options import DrawOptions, EditOptions, TextOptions
from tests.samples import samples_of

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# --- questions ------------------------------------------------------------------------------------


def test_an_answer_continues_the_image_and_the_template(model: Model) -> None:
    image = picture()
    codes = encode_images(model, read_images(model, [image]))[0]
    prompt = describe_prompt(model.vocabulary, codes.tolist())
    prompt += model.text_tokenizer.encode("Question: what is it? Answer:")
    (ids,) = generate_ids(model, [prompt], TextOptions(max_tokens=7))
    expected = model.text_tokenizer.decode(ids).strip()
    assert model.answer(image, " what is it? ", max_tokens=7) == expected
    with pytest.raises(ValueError, match="the question is empty"):
        model.answer(image, "  ")


def test_templates() -> None:
    templates = Templates(question="Q {text} {0} A")
    assert templates.ask("{text}?") == "Q {text}? {0} A"  # braces of a question stay
    assert Templates().judge("it is red.") == "True or false? it is red. Answer:"
    with pytest.raises(ValueError, match="template statement"):
        Templates(statement="no place for it")


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["masked", "causal"])
def test_a_thousand_drawings_are_complete_and_of_image_codes(model: Model, method: str) -> None:
    texts = ["a red bus", "two dogs"] * 50
    for seed in range(10):
        options = DrawOptions(
            method=method,  # type: ignore[arg-type]
            steps=2,
            guidance_scale=1.0 + seed % 2,
            temperature=2.0,
            seed=seed,
        )
        codes = draw_codes(model, texts, options)
        assert codes.shape == (100, 16)
        assert 0 <= int(codes.min()) and int(codes.max()) < 64


@pytest.mark.parametrize("method", ["masked", "causal"])
def test_the_same_seed_draws_the_same_in_any_number(model: Model, method: str) -> None:
    options = {"method": method, "seed": 3, "steps": 4}
    four = [np.asarray(image) for image in model.draw("a red bus", 4, **options)]  # type: ignore[arg-type]
    (alone,) = model.draw("a red bus", 1, **options)  # type: ignore[arg-type]
    assert (np.asarray(alone) == four[0]).all()
    assert len({image.tobytes() for image in four}) == 4, "the rows of one seed differ"


def test_causal_guidance(model: Model) -> None:
    def draw(scale: float, text: str = "a red bus") -> list[int]:
        options = DrawOptions(method="causal", guidance_scale=scale, temperature=0)
        return [int(code) for code in draw_codes(model, [text], options)[0]]

    assert draw(1) == draw(1 + 1e-6), "1 is no guidance"
    assert draw(1) != draw(5)
    assert draw(0) == draw(0, "two dogs run on the beach"), "0 ignores the text"
    assert draw(1) != draw(0)


def test_causal_drawing_is_the_argmax_of_the_full_forward(model: Model) -> None:
    v = model.vocabulary
    options = DrawOptions(method="causal", guidance_scale=1, temperature=0)
    codes = draw_codes(model, ["a red bus"], options)[0]
    prompt = draw_prompt(v, model.text_tokenizer.encode("a red bus"))
    ids = torch.tensor([[*prompt, *(codes + v.image_start).tolist()]])
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1])[None]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
        transformer = model.network.transformer
        logits = transformer.logits(transformer(ids, positions, causal))[0]
    images = logits[len(prompt) - 1 : -1, v.image_start : v.image_end]
    assert images.argmax(-1).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": " "}, "the text is empty"),
        ({"n": 0}, "n=0"),
        ({"method": "magic"}, "method='magic'"),
        ({"steps": 0}, "steps=0"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"text": "word " * 10_000}, "the model reads at most 4096"),
    ],
)
def test_impossible_drawings_are_refused(
    model: Model, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.draw(**{"text": "a bus", **options})  # type: ignore[arg-type]


def test_what_a_user_writes_is_never_a_special(model: Model) -> None:
    """Users may write "<boi>", which is five letters, and a lone surrogate."""
    ids = prompt_ids(model, ["<boi><eos> \ud800"])
    assert ids[0] == model.vocabulary.bos and max(ids[1:]) < model.vocabulary.text_size
    assert len(model.draw("<boi> \ud800", steps=1)) == 1


# --- editing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_codes_under_the_mask(fit: Fit) -> None:
    """A white quarter of an image of any shape, in the codes where the model sees it."""
    mask = box_mask((64, 32), (0, 0, 32, 16))
    fresh = masked_codes(mask, fit, 32, 4).reshape(4, 4)
    expected = {
        "squash": [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4],
        "crop": [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4],
        "letterbox": [[0] * 4, [1, 1, 0, 0], [0] * 4, [0] * 4],
    }
    assert fresh.int().tolist() == expected[fit]


def test_a_single_white_pixel_is_enough() -> None:
    mask = box_mask((32, 32), (9, 17, 10, 18))
    assert masked_codes(mask, "squash", 32, 4).nonzero().tolist() == [[9]]


def test_codes_outside_the_mask_stay(model: Model) -> None:
    pixels = to_tensor(fit_image(picture(), 32, "squash"))[None]
    known = encode_images(model, pixels).repeat(3, 1)
    fresh = torch.zeros(3, 16, dtype=torch.bool)
    fresh[0, 5], fresh[1, :9] = True, True
    for steps in (1, 4, 30):
        options = DrawOptions(method="masked", steps=steps)
        unknown = known.masked_fill(fresh, UNKNOWN)
        codes = draw_codes(model, ["a red bus"] * 3, options, known=unknown)
        assert torch.equal(codes[~fresh], known[~fresh])
        assert codes.min() >= 0
    assert torch.equal(codes[2], known[2]), "nothing to draw"


def test_an_edit_changes_nothing_outside(model: Model) -> None:
    image = picture(size=(50, 40))
    edited = np.asarray(model.edit(image, (10, 5, 30, 25), "a red bus"))
    before, box = np.asarray(image), np.zeros((40, 50), bool)
    box[5:25, 10:30] = True
    assert edited.shape == before.shape
    assert (edited[~box] == before[~box]).all() and (edited[box] != before[box]).any()
    mask = box_mask(image.size, (10, 5, 30, 25))
    again = np.asarray(model.edit(image, mask, "a red bus"))
    assert (again == edited).all(), "a box is a mask"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((0, 0, 0, 9), "expected x0 < x1"),
        ((0, 0, 33, 9), "inside the image of 32 x 32"),
        ((-1, 0, 9, 9), "inside the image"),
        (Image.new("RGB", (9, 9), "white"), "the mask has 9 x 9 pixels, the image 32 x 32"),
        (Image.new("RGB", (32, 32)), "nothing to draw"),
    ],
)
def test_impossible_masks_are_refused(
    model: Model, mask: Image.Image | tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.edit(picture(), mask, "a red bus")


def test_an_edit_where_the_model_sees_only_the_middle(tiny_model: Make) -> None:
    cropped = tiny_model(noise=0.1)
    cropped.image_tokenizer.fit = "crop"
    image = picture(size=(64, 32))
    mask = Image.new("L", image.size, 255)
    edited = np.asarray(edit_image(cropped, image, mask, "a red bus", EditOptions()))
    before = np.asarray(image)
    assert (edited[:, :16] == before[:, :16]).all() and (edited[:, 48:] == before[:, 48:]).all()
    assert (edited[:, 16:48] != before[:, 16:48]).mean() > 0.9


# --- embeddings -----------------------------------------------------------------------------------


def test_embeddings_are_the_states_that_training_aligns(model: Model) -> None:
    image, text = picture(), "a red bus"
    codes = encode_images(model, read_images(model, [image])).cpu().numpy()
    (sample,) = samples_of([{"captions": [text]}])
    pair = model.batch_builder(160).pair(replace(sample, codes=codes))
    packed = pack([pair.describe, pair.draw], 200, model.vocabulary.pad)
    with torch.inference_mode():
        states = model.network.hidden(packed).flatten(0, 1)[packed.states]
        expected = (
            model.network.alignment.embed_image(states[:1]),
            model.network.alignment.embed_text(states[1:]),
        )
    images = model.embed(images=[image, picture(1)])
    texts = model.embed(texts=["two dogs run", text])
    assert torch.allclose(images[0], expected[0][0], atol=1e-5)
    assert torch.allclose(texts[1], expected[1][0], atol=1e-5)
    for rows in (images, texts):
        assert rows.shape == (2, 32) and rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-6)
    assert model.embed(images=[]).shape == (0, 32)
    with pytest.raises(ValueError, match="one of the two"):
        model.embed()


def test_the_cache_knows_files_by_their_content(model: Model, tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    paths = list_images(tmp_path).files
    cache = EmbeddingCache(tmp_path / "cache", "f00")
    first = dict(embed_files(model, paths, cache, batch_size=2))
    cache.save()
    assert isinstance(first[tmp_path / "broken.png"], ValueError) and cache.added == 3
    (tmp_path / "0.png").rename(tmp_path / "zero.png")
    again = EmbeddingCache(tmp_path / "cache", "f00")
    second = dict(embed_files(model, list_images(tmp_path).files, again))
    assert again.added == 0, "a renamed file is known"
    assert torch.equal(second[tmp_path / "zero.png"], first[tmp_path / "0.png"])  # type: ignore[arg-type]
    assert not EmbeddingCache(tmp_path / "cache", "other").rows, "each model has its own cache"
    again.path.write_bytes(b"damaged")
    assert not EmbeddingCache(tmp_path / "cache", "f00").rows, "a damaged cache is made anew"


# --- any mix --------------------------------------------------------------------------------------


def test_a_prompt_is_its_parts_in_order(model: Model, tmp_path: Path) -> None:
    v, image = model.vocabulary, picture()
    image.save(tmp_path / "one.png")
    ids = (encode_images(model, read_images(model, [image]))[0] + v.image_start).tolist()
    text = model.text_tokenizer.encode("a red bus")
    expected = [v.bos, *text, v.boi, *ids, v.eoi, v.boi, *ids, v.eoi, *text]
    assert prompt_ids(model, ["a red bus", image, tmp_path / "one.png", "a red bus"]) == expected


def test_text_after_an_image_is_its_caption(model: Model) -> None:
    image = picture()
    (caption,) = model.caption([image], max_tokens=9)
    assert model.generate([image], max_tokens=9) == [caption]


def test_an_image_after_a_text_is_a_causal_drawing(model: Model) -> None:
    (drawn,) = model.generate(["a red bus"], output="image")
    (expected,) = model.draw("a red bus", method="causal", guidance_scale=1, temperature=0)
    assert isinstance(drawn, Image.Image)
    assert (np.asarray(drawn) == np.asarray(expected)).all()


def test_any_mix_comes_out_by_the_grammar(tiny_model: Make) -> None:
    """A model that draws after five tokens where it may, and ends after two images."""
    eager = tiny_model(noise=0.1, tied=False)
    v, images, steps = eager.vocabulary, [0], [0]
    logits = type(eager.network.transformer).logits

    def forced(hidden: torch.Tensor, *ids: slice) -> torch.Tensor:
        scores = logits(eager.network.transformer, hidden, *ids)
        scores[..., v.text_size :] = scores[..., v.text_size :].clamp(max=50)
        scores[..., v.boi] = 1e4 if steps[0] % 5 == 4 and images[0] < 2 else -1e4
        scores[..., v.eos] = 1e4 if images[0] == 2 else -1e4
        steps[0] += 1
        images[0] += int(scores[..., v.boi].item() > 0)
        return scores

    eager.network.transformer.logits = forced  # type: ignore[method-assign]
    parts = eager.generate(["a"], output="any", max_tokens=100)
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    assert kinds[0] == "text" and 1 <= kinds.count("image") <= 2
    assert all(part.size == (32, 32) for part in parts if isinstance(part, Image.Image))


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("a red bus", {}, "the prompt is empty: give a list"),
        (["a"], {"output": "video"}, "output='video'"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["word " * 10_000], {}, "the model reads at most 4096"),
    ],
)
def test_impossible_prompts_are_refused(
    model: Model, parts: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(parts, **options)  # type: ignore[arg-type]


def test_a_rounded_model_has_the_fingerprint_of_its_folder_and_can_be_saved(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    rounded = load(tiny_model_folder, dtype="bfloat16")
    assert rounded.fingerprint == load(tiny_model_folder).fingerprint
    rounded.save(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved.fingerprint != rounded.fingerprint, "it has other weights"
    assert load(tmp_path / "saved", dtype="bfloat16").caption(picture()) == rounded.caption(
        picture()
    )
    for name, weight in rounded.network.state_dict().items():
        assert torch.equal(weight.float(), saved.network.state_dict()[name].float())
