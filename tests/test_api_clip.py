"""open_clip's own code runs on a model of ours, and gives what ours gives."""

from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from multimodal.api import Model
from multimodal.api.clip import as_open_clip
from multimodal.eval.tasks.classification import zero_shot_classifier
from multimodal.inference.codec import encode_to_read
from multimodal.inference.embedding import embed_codes

NAMES = ["red bus", "dog", "two cats on a mat"]
TEMPLATES = (lambda name: f"a photo of a {name}.", lambda name: f"{name}")


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.3)


@pytest.fixture
def images() -> list[Image.Image]:
    torch.manual_seed(0)
    pixels = (torch.rand(6, 40, 30, 3) * 255).byte().numpy()
    return [Image.fromarray(array) for array in pixels]


def test_the_zero_shot_classifier_of_open_clip_is_ours(
    model: Model, images: list[Image.Image]
) -> None:
    clip, preprocess, tokenizer = as_open_clip(model)
    classifier = open_clip.build_zero_shot_classifier(
        clip, tokenizer, NAMES, TEMPLATES, num_classes_per_batch=2, device="cpu"
    )
    ours = zero_shot_classifier(model, NAMES, TEMPLATES)
    assert classifier.shape == (model.config.objectives.alignment_dim, 3)
    torch.testing.assert_close(classifier, ours, atol=1e-5, rtol=0)
    pixels = torch.stack([preprocess(image) for image in images])
    features = clip.encode_image(pixels, normalize=True)
    torch.testing.assert_close(features, model.embed(images=images), atol=1e-5, rtol=0)
    assert (features @ classifier).std() > 0.01


def test_any_picture_is_read_as_ours_is(model: Model) -> None:
    """Transparent, of 16 bits, turned by its EXIF: and in half precision."""
    clear = Image.new("RGBA", (40, 30), (200, 0, 0, 0))
    clear.paste((0, 0, 200, 255), (0, 0, 15, 15))
    grey = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    turned.getexif()[0x0112] = 6
    clip, preprocess, _ = as_open_clip(model)
    pixels = torch.stack([preprocess(image) for image in (clear, grey, turned)])
    expected = model.embed(images=[clear, grey, turned])
    torch.testing.assert_close(clip.encode_image(pixels), expected, atol=1e-5, rtol=0)
    scale = model.network.alignment.log_scale.dtype
    rounded = clip.to(torch.bfloat16).encode_image(pixels.bfloat16())
    assert (rounded * expected).sum(1).min() > 0.9
    assert model.network.alignment.log_scale.dtype == scale, "the model is not rounded"


def test_autocast_changes_no_codes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks of open_clip run under autocast."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "multimodal.api.clip.embed_codes",
        lambda parts, codes: (seen.append(codes), embed_codes(parts, codes))[1],
    )
    clip, _, _ = as_open_clip(model)
    torch.manual_seed(0)
    pixels = torch.randint(0, 2, (64, 3, 32, 32)).float() * 2 - 1
    clip.encode_image(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        clip.encode_image(pixels)
        rounded = encode_to_read(model, pixels)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], rounded), "autocast would change them"


def test_a_retrieval_loop_finds_what_ours_finds(model: Model, images: list[Image.Image]) -> None:
    clip, preprocess, tokenizer = as_open_clip(model)
    texts = ["a red bus", "dogs", " a much longer text about dogs on a beach ", "cats", "b", "c"]
    tokens = tokenizer(texts)
    assert tokens.dtype == torch.int64 and (tokens == model.vocabulary.pad).any()
    text_features = clip.encode_text(tokens)
    torch.testing.assert_close(text_features, model.embed(texts=texts), atol=1e-5, rtol=0)
    out = clip(torch.stack([preprocess(image) for image in images]), tokens)
    scores = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    expected = model.embed(images=images) @ model.embed(texts=texts).T
    assert scores.argsort().tolist() == expected.argsort().tolist()
    assert clip.logit_scale.exp().item() == pytest.approx(10.0, rel=0.5)
    assert tokenizer("a red bus", context_length=2).shape == (1, 2)
    with pytest.raises(ValueError, match="the text is empty"):
        tokenizer([" "])
