"""Scores of reconstructions: compared with explicit formulas, and by the command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multimodal.cli import main
from multimodal.data.images import to_tensor
from multimodal.eval.metrics.features import Features
from multimodal.eval.metrics.reconstruction import (
    KERNEL,
    ReconstructionScores,
    ms_ssim_scales,
)
from multimodal.eval.tasks.reconstruction import score_tokenizer
from multimodal.scenes.dataset import write_scenes
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer

VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 1, "heads": 2}


def scenes(count: int, size: int = 32) -> Tensor:
    import random

    pictures = [render(sample_scene(random.Random(i)), size) for i in range(count)]
    return torch.stack([to_tensor(picture) for picture in pictures])


def tokenizer(image_size: int = 32, **quantizer: Any) -> ImageTokenizer:
    torch.manual_seed(0)
    options = quantizer or {"name": "fsq", "levels": [5, 5, 5]}
    result = VQTokenizer(VQTokenizerConfig(image_size, "squash", 8, VIT, options))
    with torch.no_grad():
        for _ in range(30):  # batch statistics settle, and many codes are used
            result.train()(scenes(8, image_size))
    return ImageTokenizer(detail=result.eval())


def test_the_random_features_are_the_same_for_everyone() -> None:
    torch.manual_seed(1)
    first = Features()
    torch.manual_seed(2)
    second = Features().train()
    images = scenes(2)
    assert torch.equal(first(images), second(images)) and first.label == "random features, seed 0"
    # These numbers are fixed: if another version of torch gave other weights, values of two
    # machines could not be compared.
    weight = first.network.layers[0].weight  # type: ignore[union-attr, index]
    values = [round(x, 4) for x in weight.flatten()[:3].tolist()]
    assert values == [-0.3064, -0.3136, -0.0682], values


def test_perceptual_distance_grows_with_noise() -> None:
    features, images = Features(), scenes(4)
    assert features.distance(images, images).abs().max() < 1e-6
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    far = [features.distance(images, images + s * noise).mean() for s in (0.05, 0.2, 0.8)]
    assert 0 < far[0] < far[1] < far[2]
    moved = images.clone().requires_grad_()
    features.distance(moved, images + noise).sum().backward()
    assert moved.grad is not None and moved.grad.abs().sum() > 0, "it can be a loss"


def test_unavailable_features_raise_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected timm:MODEL.* that need no weights: random"):
        Features("vgg")
    with pytest.raises(ValueError, match="no such file"):
        Features(f"timm:resnet18={tmp_path}/none.safetensors")
    with pytest.raises(ValueError, match="no such model. Features that need no weights: random"):
        Features("timm:no_such_model")


def test_features_of_timm_are_loaded_from_a_file(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    network = timm.create_model("test_resnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    features, images = Features(f"timm:test_resnet={tmp_path}/weights.safetensors"), scenes(2, 64)
    mean, std = (
        torch.tensor(network.pretrained_cfg[name])[:, None, None] for name in ("mean", "std")
    )
    expected = network.eval().forward_features(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(features.maps(images)[-1], expected)
    # The names in the file may be those of another implementation: then the order counts.
    weights = network.state_dict().values()
    torch.save({str(number): w for number, w in enumerate(weights)}, tmp_path / "other.pth")
    ordered = Features(f"timm:test_resnet={tmp_path}/other.pth", [0, -1])
    maps, ordered_maps = features.maps(images), ordered.maps(images)
    assert len(ordered_maps) == 2 and len(maps) > 2
    assert torch.equal(ordered_maps[0], maps[0]) and torch.equal(ordered_maps[1], maps[-1])
    assert ordered.label == features.label == "features of timm:test_resnet"


def test_scores_equal_the_formulas() -> None:
    images, model, features = scenes(40), tokenizer(), Features()
    measured, kept = score_tokenizer(model, images, features, batch_size=16, keep=20)
    scores = measured.compute()
    decoded = model.decode(model.encode(images))
    assert torch.equal(kept, decoded[:20])
    error = (decoded - images).square().mean((1, 2, 3))
    assert scores["psnr"] == pytest.approx(float((-10 * torch.log10(error / 4)).mean()), abs=1e-3)
    each = (-10 * torch.log10(error / 4)).tolist()
    assert measured.per_image["psnr"] == pytest.approx(each, abs=1e-3)
    assert {name: len(values) for name, values in measured.per_image.items()} == dict.fromkeys(
        ("psnr", "ssim", "ms_ssim", "perceptual"), 40
    )
    a, b = (features(x).double().numpy() for x in (images, decoded))
    difference = np.square(a.mean(0) - b.mean(0)).sum()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    by_hand = difference + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots
    assert scores["fid"] == pytest.approx(by_hand, abs=1e-3)
    codes = model.encode(images)
    assert len(codes.unique()) > 5
    assert scores["used"] == pytest.approx(codes.unique().numel() / 125)
    assert scores["perceptual"] == pytest.approx(
        float(features.distance(decoded, images).mean()), rel=1e-4
    )


def test_perfect_reconstructions_have_the_best_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    images, model = scenes(8), tokenizer()
    monkeypatch.setattr(model, "encode", lambda x: torch.zeros(len(x), 4, 4, dtype=torch.int64))
    monkeypatch.setattr(model, "decode", lambda codes: images[: len(codes)])
    scores = score_tokenizer(model, images, Features())[0].compute()
    assert min(scores["ssim"], scores["ms_ssim"]) > 0.9999
    assert scores["perceptual"] < 1e-6 and abs(scores["fid"]) < 1e-3 and scores["psnr"] > 60


@pytest.mark.parametrize(("side", "scales"), [(32, 2), (64, 3), (128, 4), (176, 5), (256, 5)])
def test_ms_ssim_uses_as_many_scales_as_fit(side: int, scales: int) -> None:
    assert ms_ssim_scales(side) == scales


def test_torchmetrics_takes_the_scales_of_every_side() -> None:
    for side in range(KERNEL, 301):
        scales = ms_ssim_scales(side)
        assert side // max(1, scales - 1) ** 2 >= KERNEL and side >= 2**scales, side
        assert scales >= ms_ssim_scales(side - 1)
    codes = torch.zeros(1, 1, 1, dtype=torch.int64)
    for side in (11, 21, 41, 43, 81, 98, 161, 175):
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        scores = ReconstructionScores(Features(), side, 2)
        scores.update(image, image, codes)
        assert scores.per_image["ms_ssim"] == [pytest.approx(1)], side


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", 8, 0, 32)
    tokenizer().save(tmp_path / "a")
    tokenizer(16, name="lfq", channels=6).save(tmp_path / "b")
    return tmp_path


def test_the_command(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = folders / "out.json", folders / "out.png"
    command = ["tokenizer", "compare", str(folders / "a"), str(folders / "b")]
    command += ["--data", str(folders / "scenes"), "--limit", "20", "--batch-size", "8"]
    command += ["--output", str(out), "--picture", str(picture)]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and "random features, seed 0" in printed[-1]
    report = json.loads(out.read_text())
    first, second = report["tokenizers"]
    assert report["protocol"]["image_size"] == 32 and report["protocol"]["ms_ssim_scales"] == 2
    assert (first["codes"], second["codes"]) == (16, 4)
    assert first["bits_per_pixel"] == pytest.approx(16 * math.log2(125) / 32**2)
    assert second["bits_per_pixel"] == pytest.approx(4 * 6 / 32**2)
    assert first["psnr"] > 5 and first["encode_per_second"] > 0
    with Image.open(picture) as image:
        assert image.height > 3 * 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "none"], "none: not an image tokenizer"),
        (["a", "--output", "x.txt"], "expected a name that ends in .json"),
        (["a", "--limit", "0"], "expected at least 1"),
        (["a", "--split", "nope"], "no split 'nope'"),
        (["a", "--features", "inception"], "that need no weights: random"),
    ],
)
def test_error_messages_are_one_line(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folders)
    assert main(["tokenizer", "compare", "--data", "scenes", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "multimodal tokenizer" in error and error.count("\n") == 1


def test_fid_and_kid_equal_their_formulas() -> None:
    from multimodal.eval.metrics.distribution import score_distribution

    generator = torch.Generator().manual_seed(0)
    true, near, far = (torch.rand(40, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(3))
    far = far.sign()
    features = Features()
    scores = score_distribution(near, true, features)
    x, y = features(near), features(true)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(k: torch.Tensor) -> torch.Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    # Every subset has all 40 pictures, so KID is the unbiased estimate itself.
    expected = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
    expected = expected - 2 * kernel(x, y).mean()
    assert scores["kid"] == pytest.approx(expected.item(), abs=1e-5)
    assert score_distribution(near, true, features) == scores, "same seed, same numbers"
    assert score_distribution(true, true, features)["fid"] == pytest.approx(0, abs=1e-3)
    worse = score_distribution(far, true, features)
    assert worse["fid"] > 2 * scores["fid"] and worse["kid"] > abs(scores["kid"])
    assert score_distribution(true[:1], true, features) == {}
