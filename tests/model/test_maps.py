"""Attention maps are those of transformers, and fall on the places of the image they belong to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.api import Model, load
from multimodal.api.inside import BEFORE_CODES, AttentionMaps
from multimodal.export.hf import export_hf
from multimodal.model.sequences import describe_prompt
from multimodal.tokenizers.levels import Layout, Level

TEXT = "two dogs run"


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load(tiny_model_folder)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_weights_are_those_of_transformers(
    model: Model, tiny_model_folder: Path, image: Image.Image, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    export_hf(tiny_model_folder, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", attn_implementation="eager")
    ids = describe_prompt(model.vocabulary, model.encode_images(image).tolist())
    text = model.text_tokenizer.encode(TEXT)
    with torch.inference_mode():
        theirs = stock(torch.tensor([ids + text]), output_attentions=True).attentions
    maps = model.attention(image, TEXT)
    assert "".join(maps.tokens) == TEXT
    expected = torch.stack(theirs)[:, 0, :, len(ids) - 1 : -1]
    torch.testing.assert_close(maps.weights, expected, rtol=0, atol=1e-5)
    assert float(maps.weights.std()) > 1e-3, "no position stands out: the test shows nothing"


def test_looking_changes_nothing(model: Model, image: Image.Image) -> None:
    before = model.caption(image, max_tokens=8)
    first, second = (model.attention(image, TEXT).weights for _ in range(2))
    assert torch.equal(first, second)
    assert model.caption(image, max_tokens=8) == before


def test_the_own_caption_is_looked_at_where_no_text_is_given(
    model: Model, image: Image.Image
) -> None:
    def whole(text: str) -> str:
        """Without the characters of which a token has a part only."""
        return text.replace("\N{REPLACEMENT CHARACTER}", "").strip()

    assert whole("".join(model.attention(image).tokens)) == whole(model.caption(image))
    with pytest.raises(ValueError, match="empty"):
        model.attention(image, " ")
    with pytest.raises(ValueError, match="reads at most"):
        model.attention(image, "a dog " * 4096)


def test_weights_on_an_image_lie_where_the_codes_of_a_level_are() -> None:
    layout = Layout((Level("meaning", 2, 2, 8), Level("detail", 3, 1, 100)))
    length = BEFORE_CODES + layout.codes_per_image + 3
    weights = torch.rand(2, 1, 4, length, generator=torch.Generator().manual_seed(0))
    weights /= weights.sum(-1, keepdim=True)
    both = AttentionMaps(list("abcd"), weights, layout, ("meaning", "detail"))
    # of the second row of meaning the first position: its two codes are numbers 4 and 5
    expected = weights[..., BEFORE_CODES + 4] + weights[..., BEFORE_CODES + 5]
    torch.testing.assert_close(both.on_image("meaning")[..., 1, 0], expected)
    assert torch.equal(both.on_image("detail")[..., 2, 1], weights[..., BEFORE_CODES + 8 + 7])
    assert torch.equal(both.on_image(), both.on_image("meaning"))
    alone = AttentionMaps(list("abcd"), weights, layout, ("detail",))
    assert torch.equal(alone.on_image()[..., 0, 0], weights[..., BEFORE_CODES])
    with pytest.raises(ValueError, match="reads detail"):
        alone.on_image("meaning")


def test_codes_are_the_image_again(model: Model, image: Image.Image) -> None:
    codes = model.encode_images([image, image])
    assert torch.equal(codes[0], model.encode_images(image))
    one, both = model.decode_images(codes[0]), model.decode_images(codes)
    assert isinstance(one, Image.Image) and isinstance(both, list)
    assert one.tobytes() == both[1].tobytes() and one.size == (32, 32)
    pixels = model.image_tokenizer.decode(codes)[0]
    back = torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(back, pixels.clamp(-1, 1), rtol=0, atol=1 / 127)
    grid = model.config.layout.unflatten("detail", codes)
    assert torch.equal(model.config.layout.flatten("detail", grid), codes)
