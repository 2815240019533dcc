"""The exported image tokenizer gives the codes and the pixels of ours, in onnxruntime."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from multimodal.cli import main
from multimodal.provenance import Provenance
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, fit_codebooks

VIT = {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
VQGAN = {"name": "vqgan", "channels": 32, "multipliers": [1, 1, 1], "depth": 1}


def tokenizer_of(kind: str) -> ImageTokenizer:
    torch.manual_seed(0)
    fsq = {"name": "fsq", "levels": [5, 5, 5]}
    if kind == "detail":
        config = VQTokenizerConfig(32, "squash", 4, VQGAN, fsq)
        return ImageTokenizer(None, VQTokenizer(config)).eval()
    encoder = Encoder("timm:test_efficientnet", pretrained=False)
    sizes = MeaningConfig(encoder.name, (), 64, grid=2, groups=2, codebook_size=16, channels=8)
    meaning = Meaning(sizes, encoder)
    fit_codebooks(meaning, meaning.features(torch.rand(40, 3, 64, 64) * 2 - 1).flatten(0, 2))
    if kind == "meaning":
        return ImageTokenizer(meaning).eval()
    size = 96 if kind == "larger detail" else 32
    config = VQTokenizerConfig(size, "squash", 8, VIT, fsq, 8, meaning.fingerprint)
    return ImageTokenizer(meaning, VQTokenizer(config)).eval()


@pytest.mark.parametrize(
    "kind",
    [
        "larger meaning",
        "larger detail",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("detail", "meaning")),
    ],
)
def test_codes_and_images_are_ours(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer_of(kind)
    made.provenance = Provenance(("Only on Sundays.",), ({"kind": "data", "name": "photos"},))
    made.save(tmp_path / "ours")
    ours, out = load_image_tokenizer(tmp_path / "ours"), tmp_path / "onnx"
    assert main(["export", "onnx", str(tmp_path / "ours"), str(out)]) == 0
    assert Provenance.read(out) == made.provenance
    about = json.loads((out / "image_tokenizer.json").read_text("utf-8"))
    assert about["codes_per_image"] == ours.codes_per_image
    assert about["fingerprint"] == ours.fingerprint
    size = about["image_size"]
    for count in (1, 40):  # any number of images, and more than one block of distances
        images = torch.rand(count, 3, size, size) * 2 - 1
        session = onnxruntime.InferenceSession(out / "encode.onnx")
        (codes,) = session.run(None, {"images": images.numpy()})
        assert codes.dtype == np.int64
        assert (codes == ours.encode(images).numpy()).mean() > 0.999
        if kind == "meaning":
            assert not (out / "decode.onnx").exists() and about["drawn_size"] is None
            continue
        decoder = onnxruntime.InferenceSession(out / "decode.onnx")
        (drawn,) = decoder.run(None, {"codes": codes})
        expected = ours.decode(torch.from_numpy(codes)).numpy()
        assert expected.std() > 0.05 and np.abs(drawn - expected).max() < 1e-4
    assert main(["export", "onnx", str(tmp_path / "ours"), str(out)]) == 1
    assert "not empty" in capsys.readouterr().err
