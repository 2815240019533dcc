"""Training of the levels: a decoder that reads meaning, a projection, batches without images."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.cli import main
from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.data.shards import Shards
from multimodal.tokenizers.detail import VQTokenizerConfig
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.levels import Level
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, fit_codebooks
from multimodal.train.examples import Examples
from multimodal.train.tokenizers.detail import DetailModule
from multimodal.train.tokenizers.meaning import MeaningModule


@pytest.fixture(scope="module")
def images(work: Path) -> Tensor:
    """float[16, 3, 64, 64]"""
    samples = list(Shards(work / "scenes", "val"))[:16]
    return torch.stack([to_tensor(fit_image(open_image(s.image), 64, "squash")) for s in samples])


@pytest.fixture(scope="module")
def meaning(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meaning")
    torch.manual_seed(0)
    encoder = Encoder("timm:test_efficientnet", pretrained=False)
    config = MeaningConfig(
        encoder.name, image_size=64, grid=2, groups=1, codebook_size=8, channels=6
    )
    made = Meaning(config, encoder)
    fit_codebooks(made, made.features(images).flatten(0, 2), rounds=4)
    made.save(folder)
    return folder


def test_the_decoder_learns_to_read_meaning_and_both_levels_are_exported(
    work: Path, meaning: Path, images: Tensor, tmp_path: Path
) -> None:
    start, run = work / "tokenizer" / "model", tmp_path / "run"
    fit = ["fit", "--config", str(work / "tokenizer.yaml"), "--init_from", str(start)]
    fit += ["--model.init_args.decoder_only", "true", "--model.init_args.meaning"]
    few = ["--trainer.max_steps", "4"]
    assert main([*fit, str(meaning), "--output", str(run), *few]) == 0
    before, after = load_image_tokenizer(start), load_image_tokenizer(run / "model")
    assert after.meaning is not None and after.detail is not None and before.detail is not None
    assert after.meaning.fingerprint == Meaning.load(meaning).fingerprint
    assert after.image_size == 64 and after.drawn_size == before.drawn_size == 16
    # The codes are those of the start, of the picture at its own size.
    codes = after.encode(images)
    assert torch.equal(codes[:, 4:] - 8, before.encode(after.detail_images(images)))
    assert after.levels_fingerprints["detail"] == before.codes_fingerprint
    assert after.detail.decoder.first_layer[:, 2:].abs().max() > 0, "and meaning has been read"
    # A model of both levels can be trained further, by its own folder alone.
    again = [*fit[:3], "--init_from", str(run / "model"), *fit[5:], str(run / "model")]
    assert main([*again, "--trainer.max_steps", "1", "--output", str(tmp_path / "again")]) == 0
    weights = load_file(run / "model/detail/model.safetensors")
    more = load_file(tmp_path / "again/model/detail/model.safetensors")
    changed = {name.split(".")[0] for name in weights if not torch.equal(weights[name], more[name])}
    assert changed == {"decoder"}


def test_meaning_for_codes_is_refused(
    work: Path, meaning: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", str(work / "tokenizer.yaml"), "--output", str(tmp_path)]
    assert main([*fit, "--model.init_args.meaning", str(meaning)]) == 1
    assert "meaning is for the decoder alone: give decoder_only too" in capsys.readouterr().err
    fit += ["--model.init_args.decoder_only", "true", "--model.init_args.meaning"]
    assert main([*fit, str(work / "tokenizer" / "model")]) == 1
    assert "has no level of meaning" in capsys.readouterr().err


def test_the_projection_of_a_level_of_meaning_is_trained(work: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, config = tmp_path / "network.safetensors", tmp_path / "meaning.yaml"
    save_file(timm.create_model("test_efficientnet").state_dict(), weights)
    config.write_text(
        MEANING.format(weights=weights, data=work / "scenes", output=tmp_path / "run"), "utf-8"
    )
    arguments = ["fit", "--config", str(config)]
    steps = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "40"]
    assert main([*arguments, *steps]) == 0
    report = json.loads((tmp_path / "run/model/report.json").read_text("utf-8"))
    tokenizer = load_image_tokenizer(tmp_path / "run/model")
    meaning = tokenizer.meaning
    assert meaning is not None and meaning.config.form == "fsq"
    assert tokenizer.layout["meaning"] == Level("meaning", 2, 2, 9) and tokenizer.image_size == 64
    # It starts from the principal components of a batch: less is lost when it has learned more.
    main([*arguments, "--trainer.max_steps", "1", "--output", str(tmp_path / "start")])
    start = json.loads((tmp_path / "start/model/report.json").read_text("utf-8"))
    assert report["variance_lost"] < 0.8 * start["variance_lost"]
    # Codes are those of the scalar quantizer, by its definition: round(tanh(x)) of three values.
    samples = list(Shards(work / "scenes", "val"))[:4]
    pixels = [to_tensor(fit_image(open_image(s.image), 64, "squash")) for s in samples]
    features = meaning.features(torch.stack(pixels))
    values = torch.tanh((features - meaning.center) @ meaning.components).mul(1.001).round() + 1
    expected = values.unflatten(-1, (2, 2)) @ torch.tensor([1.0, 3.0])
    codes = meaning.encode(torch.stack(pixels))
    assert torch.equal(codes, expected.long())
    assert torch.equal(meaning.lookup(codes), values - 1)
    used = [len(codes[..., group].unique()) / 9 for group in range(2)]
    assert min(group["used"] for group in report["groups"]) >= min(used) > 0.2
    # It can be trained further.
    more = [*arguments, "--init_from", str(tmp_path / "run/model"), "--trainer.max_steps", "1"]
    assert main([*more, "--output", str(tmp_path / "more")]) == 0
    again = Meaning.load(tmp_path / "more/model").encode(torch.stack(pixels))
    assert (again == codes).float().mean() > 0.8


def examples(images: Tensor) -> Examples:
    """Images with captions, or one plain text."""
    pixels, count = (127.5 * images + 127.5).byte(), max(1, len(images))
    records: list[dict[str, Any]] = [{"captions": ["a red circle"]}] * count
    documents: list[list[str | None]] = [[] if len(images) else ["a text"]] * count
    zeros = [0] * count
    return Examples([f"{n}" for n in range(count)], pixels, records, zeros, zeros, documents, [])


def logged_by(module: DetailModule | MeaningModule, batches: list[Examples]) -> dict[str, Any]:
    """What a rank logs in validation: by name, in its order, values and their weights."""
    found: dict[str, Any] = {}

    def log(name: str, value: Tensor, batch_size: int, sync_dist: bool) -> None:
        found.setdefault(name, []).append((float(value), batch_size))

    def log_dict(values: dict[str, Tensor], **options: Any) -> None:
        for name, value in values.items():
            log(name, value, **options)

    module.log, module.log_dict = log, log_dict  # type: ignore[assignment, method-assign]
    module.eval().on_validation_epoch_start()
    with torch.no_grad():
        for number, batch in enumerate(batches):
            module.validation_step(batch, number)
    return found


def test_ranks_log_the_same_names_in_the_same_order_whatever_is_in_their_batches(
    work: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vit = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 0, "heads": 2}
    quantizer = {"name": "vq", "codebook_size": 8, "channels": 4}
    config = VQTokenizerConfig(64, "squash", 32, vit, quantizer)
    module = DetailModule(
        config,
        text_tokenizer=str(work / "text.json"),
        semantic_weight=0.5,
        teacher_weight=0.1,
        teacher="random",
        discriminator_weight=0.1,
        perceptual_weight=0.1,
    )
    shown: list[Examples] = []
    monkeypatch.setattr(module, "_log_pictures", shown.append)
    full, none = examples(images[:3]), examples(images[:0])
    one = logged_by(module, [none, full])
    assert module.val_usage.counts.sum() == 3 * 4
    other = logged_by(module, [full, none])
    assert list(one) == list(other) and len(one) >= 10 and shown == [full]
    for name, both in one.items():
        assert [weight for _, weight in both] == [0, 3]
        assert both == other[name][::-1] and all(isfinite(value) for value, _ in both)
    # In training it has gradients of zero, and codes of nothing.
    total, parts = module.train().step(none)
    total.backward()
    assert list(parts) == ["codes"] and not parts["codes"].numel()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_the_projection_of_meaning_starts_with_the_first_images(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "network.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), weights)
    name = f"timm:test_efficientnet={weights}"
    module = MeaningModule(name, image_size=64, grid=2, levels=(3, 3), width=32)
    full, none = examples(images), examples(images[:0])
    # All ranks meet as often, with images or without.
    meetings: list[Tensor] = []
    monkeypatch.setattr("multimodal.train.tokenizers.meaning.distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast", lambda each, rank: meetings.append(each))
    for batch, met in ((none, 4), (full, 8), (none, 8), (full, 8)):
        lost, codes = module.step(batch)
        assert len(meetings) == met and lost.isfinite() and lost.requires_grad
        assert len(codes) == len(batch.images) and bool(lost) == bool(len(codes))
    found = logged_by(module, [none, full])
    assert list(found) == ["val/variance_lost"]
    assert found["val/variance_lost"][0] == (0.0, 0) and found["val/variance_lost"][1][1] == 16
    assert module.usage[0].counts.sum() == 16 * 4


MEANING = """
output: {output}
seed_everything: 0
model:
  class_path: multimodal.train.tokenizers.meaning.MeaningModule
  init_args:
    encoder: timm:test_efficientnet={weights}
    image_size: 64
    grid: 2
    levels: [3, 3]
    width: 32
    learning_rate: 1.0e-2
    warmup_steps: 2
data: {{folders: [{data}], global_batch_size: 16, val_limit: 16, workers: 0}}
trainer: {{accelerator: cpu, logger: false, val_check_interval: 1, check_val_every_n_epoch: null}}
"""
