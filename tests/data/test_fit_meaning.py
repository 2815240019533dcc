"""``multimodal tokenizer meaning`` and ``join``."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from multimodal.cli import main
from multimodal.data import fit_meaning
from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.data.shards import Shards
from multimodal.scenes.dataset import write_scenes
from multimodal.tokenizers.detail import ImageTokenizerConfig, VQTokenizer
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.meaning import Meaning

VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meaning")
    write_scenes(folder / "scenes", 40, 0, 32, shard_size=15)
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet")
    save_file(network.state_dict(), folder / "network.safetensors")
    return folder


def command(work: Path, out: Path, *more: str) -> list[str]:
    encoder = f"timm:test_efficientnet={work / 'network.safetensors'}"
    arguments = ["tokenizer", "meaning", str(work / "scenes"), "--out", str(out)]
    arguments += ["--encoder", encoder, "--image-size", "64", "--codes", "6", "--groups", "2"]
    return [*arguments, "--channels", "8", "--rounds", "4", *more]


def test_a_tokenizer_of_the_features_of_shards(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "meaning"
    assert main(command(work, out)) == 0
    assert "2 of 6 codes" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    losses = [group["variance_lost"] for group in report["groups"]]
    assert 1 > losses[0] > losses[1] > 0
    assert not (out / ".features").exists() and not (out / "fitting.json").exists()
    tokenizer = load_image_tokenizer(out)
    assert tokenizer.meaning is not None
    images = torch.stack(
        [
            to_tensor(fit_image(open_image(sample.image), 64, "squash"))
            for sample in Shards(work / "scenes", "train")
        ]
    )
    # What is lost on all positions of the same images is what the report says.
    meaning = tokenizer.meaning
    components = meaning.project(meaning.features(images))
    lost = (components - meaning.lookup(meaning.encode(images))).square().sum()
    assert losses[1] == pytest.approx(float(lost / components.square().sum()), rel=0.02)


def test_a_stopped_run_goes_on_and_gives_the_same(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(command(work, whole)) == 0
    encoded: list[str] = []
    read = fit_meaning._features

    def features(source: Shards, *rest: object) -> torch.Tensor:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(str(source.sizes))
        return read(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fit_meaning, "_features", features)
    assert main(command(work, stopped)) != 0
    assert main(command(work, stopped, "--seed", "1")) == 1
    assert "begun with other shards or options" in capsys.readouterr().err
    encoded.clear()
    assert main(command(work, stopped)) == 0
    assert len(encoded) == 1  # of three shards, two were done
    assert Meaning.load(stopped).fingerprint == Meaning.load(whole).fingerprint


def test_two_levels_become_one_tokenizer(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(work, tmp_path / "meaning", "--half", "--images", "20")) == 0
    quantizer = {"name": "fsq", "levels": [4, 4, 4]}
    VQTokenizer(ImageTokenizerConfig(32, "squash", 8, VIT, quantizer)).save(tmp_path / "detail")
    parts = [str(tmp_path / "meaning"), str(tmp_path / "detail")]
    assert main(["tokenizer", "join", *parts, "--out", str(tmp_path / "both")]) == 0
    both = load_image_tokenizer(tmp_path / "both")
    assert [level.name for level in both.layout.levels] == ["meaning", "detail"]
    assert isinstance(both, ImageTokenizer) and both.image_size == 64 and both.drawn_size == 32
    assert main(["tokenizer", "join", *parts[::-1], "--out", str(tmp_path / "wrong")]) == 1
    assert "has no such level" in capsys.readouterr().err
