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
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.scenes.dataset import write_scenes
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
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


def test_an_unreadable_image_is_named_and_a_folder_named_twice_counts_once(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    samples = [
        (
            s.key,
            {
                "png": s.image[: 40 if s.key.endswith("3") else None],
                "json": json.dumps(s.record).encode(),
            },
        )
        for s in Shards(work / "scenes", "train")
    ]
    write_tar(torn / "train-0000.tar", samples)
    write_manifest(torn, [index_shard(torn / "train-0000.tar")])
    arguments = command(work, tmp_path / "once")
    arguments[2] = str(torn)
    assert main(arguments) == 0
    errors = capsys.readouterr().err
    broken = [s.key for s in Shards(torn, "train") if s.key.endswith("3")]
    assert broken and all(key in errors for key in broken)
    assert f"left out {len(broken)} images" in errors
    twice = command(work, tmp_path / "twice")
    twice[2:3] = [str(torn), f"{torn}/"]
    assert main(twice) == 0
    assert (
        Meaning.load(tmp_path / "twice").fingerprint == Meaning.load(tmp_path / "once").fingerprint
    )
    mode = (tmp_path / "once" / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "once" / "config.json").stat().st_mode


def test_a_shard_without_a_usable_image_adds_nothing_to_features_with_colours(
    work: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, end in (("train-0000", 40), ("train-0001", None)):
        samples = [
            (f"{name}-{s.key}", {"png": s.image[:end], "json": json.dumps(s.record).encode()})
            for s in list(Shards(work / "scenes", "train"))[:8]
        ]
        write_tar(shards / f"{name}.tar", samples)
    write_manifest(shards, [index_shard(file) for file in sorted(shards.glob("*.tar"))])
    arguments = command(work, tmp_path / "meaning", "--colours")
    arguments[2] = str(shards)
    assert main(arguments) == 0
    assert Meaning.load(tmp_path / "meaning").level.groups == 3


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
    VQTokenizer(VQTokenizerConfig(32, "squash", 8, VIT, quantizer)).save(tmp_path / "detail")
    parts = [str(tmp_path / "meaning"), str(tmp_path / "detail")]
    assert main(["tokenizer", "join", *parts, "--out", str(tmp_path / "both")]) == 0
    both = load_image_tokenizer(tmp_path / "both")
    assert [level.name for level in both.layout.levels] == ["meaning", "detail"]
    assert isinstance(both, ImageTokenizer) and both.image_size == 64 and both.drawn_size == 32
    assert main(["tokenizer", "join", *parts[::-1], "--out", str(tmp_path / "wrong")]) == 1
    assert "has no such level" in capsys.readouterr().err
