"""Text and image tokenizers: round trips, shapes, files, and what is refused."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.model.vocabulary import SPECIALS
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.text import TextTokenizer

# --- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_tokenizer(sentences: tuple[str, ...]) -> TextTokenizer:
    return TextTokenizer.train([*sentences, *SPECIALS] * 5, 320)


def random_text(rng: random.Random) -> str:
    """Runs of code points of one kind: controls, combining marks, emoji. No surrogates."""
    kinds = [(0, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x370, 0xD7FF), (0xE000, 0xFFFF)]
    kinds += [(0x10000, 0x10FFFF), (0x1F300, 0x1FAFF), (0x2000, 0x206F)]
    parts = []
    for _ in range(rng.randrange(6)):
        low, high = rng.choice(kinds)
        parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(12))))
    return "".join(parts)


def test_decoding_restores_the_text(text_tokenizer: TextTokenizer) -> None:
    rng = random.Random(0)
    for text in (random_text(rng) for _ in range(1000)):
        ids = text_tokenizer.encode(text)
        assert text_tokenizer.decode(ids) == text
        assert all(0 <= i < len(text_tokenizer) for i in ids)


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two  spaces ", "\n\t\r\n", "\x00", "a" * 100_000, "e\u0301 \u200d \ufeff \u202e",
     "👩‍👩‍👧‍👦", "ＦＵＬＬ", "<bos><eos><pad><|endoftext|>", "Ġ", "\ufffd"],
)  # fmt: skip
def test_decoding_restores_unusual_texts(text_tokenizer: TextTokenizer, text: str) -> None:
    assert text_tokenizer.decode(text_tokenizer.encode(text)) == text


def test_a_lone_surrogate_becomes_a_question_mark(text_tokenizer: TextTokenizer) -> None:
    assert text_tokenizer.decode(text_tokenizer.encode("a\ud800b\udfff")) == "a?b?"


def test_a_special_token_in_a_text_is_plain_text(text_tokenizer: TextTokenizer) -> None:
    # The training text holds them too, so a merge may give "<bos>". Its id is still a text id.
    for special in SPECIALS:
        ids = text_tokenizer.encode(special)
        assert ids and max(ids) < len(text_tokenizer)
        assert text_tokenizer.decode(ids) == special


def test_every_byte_has_an_id_and_training_merges_words(sentences: tuple[str, ...]) -> None:
    bytes_only = TextTokenizer.train(sentences, 256)
    assert len(bytes_only) == 256 and len(bytes_only.encode("dog")) == 3
    learned = TextTokenizer.train(sentences * 9, 400)
    assert len(learned.encode("a red bus in the snow")) <= 8
    with pytest.raises(ValueError, match="vocabulary_size=255: byte-level BPE needs at least 256"):
        TextTokenizer.train(sentences, 255)


def test_text_tokenizer_file_round_trip(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    text_tokenizer.save(tmp_path / "sub" / "text.json")
    again = TextTokenizer.load(tmp_path / "sub" / "text.json")
    assert again.to_json() == text_tokenizer.to_json()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: not a text tokenizer"):
        TextTokenizer.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no such file; train one with: multimodal tokenizer text"):
        TextTokenizer.load(tmp_path / "none.json")


# --- image tokenizer ------------------------------------------------------------------------------

VIT = {"name": "vit", "dim": 32, "encoder_depth": 2, "decoder_depth": 1, "heads": 2}
VQGAN = {
    "name": "vqgan",
    "channels": 32,
    "multipliers": [1, 1, 1, 2],
    "depth": 1,
    "latent_channels": 16,
}
CONFIG = {"image_size": 32, "downsample": 8, "autoencoder": VIT}
VQ = {"name": "vq", "codebook_size": 64, "channels": 4}
KINDS: dict[str, dict[str, Any]] = {
    "vit fsq": {"quantizer": {"name": "fsq", "levels": [7, 5, 5]}},
    "vit vq": {"quantizer": VQ},
    "vit vq by gradient": {"quantizer": {**VQ, "learning": "gradient"}},
    "vit lfq": {"quantizer": {"name": "lfq", "channels": 6}},
    "vit ibq": {"quantizer": {"name": "ibq", "codebook_size": 64, "channels": 8}},
    "local vit": {
        "autoencoder": {**VIT, "encoder_depth": 0},
        "quantizer": {"name": "fsq", "levels": [7, 5, 5]},
    },
    "vqgan vq": {"autoencoder": VQGAN, "quantizer": {**VQ, "normalise": False}},
}
Make = Callable[..., VQTokenizer]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> VQTokenizer:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQTokenizerConfig(**{**CONFIG, **KINDS[request.param]}))
    tokenizer.train()(pictures(16, 32))  # sets the statistics of the latents, and VQ's codebook
    return tokenizer.eval()


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth images, float[B, 3, size, size] in [-1, 1]."""
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (2 * F.interpolate(noise, size, mode="bilinear") - 1).clamp(-1, 1)


def test_shapes_and_ranges_of_codes_and_images(tokenizer: VQTokenizer) -> None:
    codes = tokenizer.encode(pictures(3, 32))
    assert codes.shape == (3, 4, 4) and codes.dtype == torch.int64
    assert 0 <= int(codes.min()) and int(codes.max()) < tokenizer.codebook_size
    images = tokenizer.decode(codes)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1
    # The reconstruction of training equals the decoded codes.
    with torch.no_grad():
        reconstruction, quantized = tokenizer(pictures(3, 32))
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(images, reconstruction.clamp(-1, 1), atol=1e-4, rtol=1e-5)


def test_codes_do_not_depend_on_the_batch(tokenizer: VQTokenizer) -> None:
    images = pictures(8, 32)
    batched = tokenizer.encode(images)
    single = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert (batched == single).float().mean() > 0.99  # sums of other shapes may round differently


def test_another_resolution_works(tokenizer: VQTokenizer) -> None:
    images = pictures(2, 48)[:, :, :40]
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 5, 6) and tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize("depth", [0, 1])
def test_without_attention_a_code_depends_on_near_pixels_only(depth: int) -> None:
    torch.manual_seed(0)
    options = {**VIT, "encoder_depth": depth}
    tokenizer = VQTokenizer(VQTokenizerConfig(**{**CONFIG, "autoencoder": options})).train()
    with torch.no_grad():
        for _ in range(20):
            tokenizer(pictures(8, 96))
    tokenizer.eval()
    before = pictures(4, 96)
    after = before.clone()
    after[..., 40:] = pictures(4, 96, seed=9)[..., 40:]
    latents = tokenizer.encoder(before), tokenizer.encoder(after)
    difference = (latents[0] - latents[1]).abs().amax((0, 1, 3))  # by column of the grid
    assert (difference[4:] > 1e-3).all()
    # A code sees 47 pixels, 23 to each side of its middle. So columns 0 and 1 end before pixel 40.
    assert (difference[:2] < 1e-5).all() == (depth == 0)


def test_images_and_codes_out_of_range_are_refused(tokenizer: VQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"images of 30 x 32 pixels: .* multiples of 8"):
        tokenizer.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\): expected \[B, 3, H, W\]"):
        tokenizer.encode(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"images from 0 to 255: expected -1 to 1"):
        tokenizer.encode(torch.arange(256.0).expand(1, 3, 8, -1).reshape(1, 3, 32, 64))
    with pytest.raises(ValueError, match="expected -1 to 1"):
        tokenizer.encode(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match=r"torch.uint8: expected floating point"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for bad in (-1, tokenizer.codebook_size):
        with pytest.raises(ValueError, match=f"expected 0 to {tokenizer.codebook_size - 1}"):
            tokenizer.decode(torch.full((1, 4, 4), bad))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample": 12}, "a power of two from 2 on"),
        ({"image_size": 36}, "not a multiple of downsample"),
        ({"autoencoder": {"name": "vit", "dim": 32, "heads": 3}}, "not a multiple of heads"),
        ({"autoencoder": {"name": "unet"}}, "expected one of vit, vqgan"),
        ({"autoencoder": {"dim": 32}}, "name is missing"),
        ({"autoencoder": {"name": "vit", "width": 3}}, "vit.width: unknown"),
        ({"autoencoder": {"name": "vqgan"}}, "downsample=8 with 5 multipliers: expected 16"),
        ({"quantizer": {"name": "fsq", "level": [3]}}, "fsq.level: unknown"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQTokenizer(VQTokenizerConfig(**{**CONFIG, **options}))


def test_folder_round_trip(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = VQTokenizer.load(tmp_path)
    assert again.config == tokenizer.config and not again.training
    assert again.fingerprint == tokenizer.fingerprint
    images = pictures(4, 32)
    assert torch.equal(again.encode(images), tokenizer.encode(images))


def test_fingerprint_is_of_weights_and_configuration(tokenizer: VQTokenizer) -> None:
    before, codes = tokenizer.fingerprint, tokenizer.codes_fingerprint
    assert before == tokenizer.fingerprint and len(before) == 16
    weight = next(tokenizer.decoder.parameters())
    with torch.no_grad():
        weight.flatten()[0] += 1e-6
        changed = tokenizer.fingerprint
        assert tokenizer.codes_fingerprint == codes, "codes do not depend on the decoder"
    tokenizer.config = replace(tokenizer.config, fit="crop")
    assert len({before, changed, tokenizer.fingerprint}) == 3
    assert tokenizer.codes_fingerprint != codes, "codes depend on the fit"


def test_an_altered_folder_is_refused(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config, state = path.read_text(), load_file(weights)
    path.write_text(json.dumps({**json.loads(config), "fit": "crop"}))
    with pytest.raises(ValueError, match="weights and config do not belong together"):
        VQTokenizer.load(tmp_path)
    path.write_text(config)
    name = min(state)
    save_file(state | {name: state[name] + 1}, weights)
    with pytest.raises(ValueError, match="weights and config do not belong together"):
        VQTokenizer.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="not an image tokenizer"):
        VQTokenizer.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing|not an image tokenizer"):
        VQTokenizer.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not an image tokenizer"):
        VQTokenizer.load(tmp_path)


def test_bf16_gives_nearly_the_same_codes(tokenizer: VQTokenizer) -> None:
    images = pictures(64, 32, seed=5)
    exact = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokenizer.encode(images)
    assert (exact == rounded).float().mean() >= 0.9


SLOW_TO_LEARN = ("vit lfq", "vit ibq", "vqgan vq")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_TO_LEARN else [])
        for name in KINDS
    ],
)
def test_a_tokenizer_overfits_one_batch_of_scenes(name: str) -> None:
    from multimodal.data.images import to_tensor
    from multimodal.scenes.rendering import render
    from multimodal.scenes.scene import sample_scene

    torch.manual_seed(0)
    scenes = [render(sample_scene(random.Random(i)), 32) for i in range(8)]
    images = torch.stack([to_tensor(scene) for scene in scenes])
    tokenizer = VQTokenizer(VQTokenizerConfig(**{**CONFIG, **KINDS[name]}))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3)

    def decibels() -> float:
        tokenizer.eval()
        error = F.mse_loss(tokenizer.decode(tokenizer.encode(images)), images)
        tokenizer.train()
        return float(-10 * torch.log10(error / 4))

    tokenizer.train()(images)
    before = decibels()
    for _ in range(80):
        reconstruction, quantized = tokenizer(images)
        loss = F.mse_loss(reconstruction, images) + sum(quantized.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert decibels() > before + 6
