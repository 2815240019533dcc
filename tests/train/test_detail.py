"""A decoder that reads meaning: trained on frozen codes, at the size that meaning reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from multimodal.cli import main
from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.data.shards import Shards
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, fit_codebooks


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
    assert main([*fit, str(meaning), "--output", str(run)]) == 0
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
