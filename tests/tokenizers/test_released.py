"""Released weights in our modules: parity with transformers, and what is refused."""

import argparse
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from multimodal.cli import main
from multimodal.tokenizers.detail import VQTokenizer
from multimodal.tokenizers.released import import_tokenizer

SIZES: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 2,
    "embed_dim": 8,
    "latent_channels": 16,
    "num_embeddings": 64,
}


def randomised(module: nn.Module) -> nn.Module:
    """Change all weights. Untrained norms are all 1, so swapped ones would pass unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return module.eval()


@pytest.fixture(scope="module")
def janus() -> JanusVQVAE:
    return randomised(JanusVQVAE(JanusVQVAEConfig(**SIZES, num_patches=8)))


@pytest.fixture(scope="module")
def chameleon() -> ChameleonVQVAE:
    return randomised(ChameleonVQVAE(ChameleonVQVAEConfig(**SIZES, resolution=32)))


def images(count: int = 4, size: int = 32) -> Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return 2 * F.interpolate(noise, size, mode="bilinear") - 1


def from_pixels(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number the levels of the decoder from the pixels, as taming does."""
    last = len(SIZES["channel_multiplier"]) - 1
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(last - int(parts[2]))
        renamed[".".join(parts)] = tensor
    return renamed


def as_llamagen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of LlamaGen's vq_model.py."""
    names = {
        ".down.": ".conv_blocks.",
        ".up.": ".conv_blocks.",
        ".block.": ".res.",
        ".mid.block_1.": ".mid.0.",
        ".mid.attn_1.": ".mid.1.",
        ".mid.block_2.": ".mid.2.",
    }
    for old, new in names.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


def chameleon_weights(chameleon: ChameleonVQVAE, janus: JanusVQVAE) -> dict[str, Tensor]:
    """Meta's file has a decoder, the class in transformers has none: take one of the same shape.

    Chameleon has no attention in its levels, so leave it out of the decoder.
    """
    decoder = {n: w for n, w in janus.state_dict().items() if n.startswith("decoder.")}
    decoder = {n: w for n, w in decoder.items() if ".up.0.attn." not in n}
    return from_pixels({**chameleon.state_dict(), **decoder})


def test_chameleon_has_the_same_codes(
    chameleon: ChameleonVQVAE, janus: JanusVQVAE, tmp_path: Path
) -> None:
    save_file(chameleon_weights(chameleon, janus), tmp_path / "vqgan.safetensors")
    ours = import_tokenizer(tmp_path / "vqgan.safetensors", 32)
    with torch.no_grad():
        theirs = chameleon.encode(images()).image_tokens.view(4, 8, 8)
    codes = ours.encode(images())
    assert torch.equal(codes, theirs) and len(codes.unique()) > 10
    torch.testing.assert_close(ours.quantizer.lookup(codes), chameleon.quantize.embedding(codes))
    assert not ours.config.autoencoder["attention"][-1]


@pytest.mark.parametrize("layout", ["janus", "llamagen"])
def test_the_decoder_gives_the_same_images(layout: str, janus: JanusVQVAE, tmp_path: Path) -> None:
    weights = dict(janus.state_dict())
    weights = as_llamagen(weights) if layout == "llamagen" else weights
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "vq.safetensors")
    ours = import_tokenizer(tmp_path / "vq.safetensors", 32)
    codes = torch.randint(64, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = janus.decode(codes.flatten(1)).clamp(-1, 1)
    torch.testing.assert_close(ours.decode(codes), theirs, atol=1e-4, rtol=0)


def test_llamagens_codes_are_those_of_unit_vectors(janus: JanusVQVAE, tmp_path: Path) -> None:
    save_file(as_llamagen(dict(janus.state_dict())), tmp_path / "vq.safetensors")
    ours = import_tokenizer(tmp_path / "vq.safetensors", 32)
    with torch.no_grad():
        latents = janus.quant_conv(janus.encoder(images())).permute(0, 2, 3, 1)
        codebook = F.normalize(janus.quantize.embedding.weight, dim=-1)
        distances = torch.cdist(F.normalize(latents, dim=-1).flatten(0, 2), codebook)
    assert torch.equal(ours.encode(images()).flatten(), distances.argmin(-1))


class ModelCheckpoint:
    """Stands for the class of Lightning 1.0."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
ModelCheckpoint.__qualname__ = "ModelCheckpoint"


def test_taming_numbers_its_levels_from_the_pixels(
    janus: JanusVQVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = from_pixels(dict(janus.state_dict()))
    # As Lightning 1.0 wrote it: the state of callbacks is keyed by their classes.
    checkpoint = {
        "state_dict": {**weights, "loss.discriminator.main.0.weight": torch.ones(3)},
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.ones(())}},
    }
    with monkeypatch.context() as patched:
        for name in ("pytorch_lightning", "callbacks", "model_checkpoint"):
            dotted = ModelCheckpoint.__module__.partition(name)
            patched.setitem(sys.modules, dotted[0] + name, ModuleType(dotted[0] + name))
        sys.modules[ModelCheckpoint.__module__].ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
        torch.save(checkpoint, tmp_path / "last.ckpt")
    ours = import_tokenizer(tmp_path / "last.ckpt", 32)
    assert not ours.config.quantizer["normalise"]
    codes = torch.randint(64, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = janus.quantize.embedding(codes).permute(0, 3, 1, 2)
        theirs = janus.decoder(janus.post_quant_conv(vectors)).clamp(-1, 1)
    torch.testing.assert_close(ours.decode(codes), theirs, atol=1e-4, rtol=0)


def test_imported_weights_become_a_folder(
    janus: JanusVQVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As LlamaGen publishes them, with the arguments and counters of the training.
    weights = {**as_llamagen(dict(janus.state_dict())), "quantize.codebook_used": torch.ones(9)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "vq_ds4.pt")
    out = tmp_path / "tokenizer"
    arguments = ["tokenizer", "import", str(tmp_path / "vq_ds4.pt"), str(out), "--image-size", "32"]
    assert main(arguments) == 0
    assert "8 x 8 codes of 64" in capsys.readouterr().out
    again, direct = VQTokenizer.load(out), import_tokenizer(tmp_path / "vq_ds4.pt", 32)
    assert torch.equal(again.encode(images()), direct.encode(images()))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/multimodal-was-here"),))


def refused(path: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.parent / "out"
    assert main(["tokenizer", "import", str(path), str(out), "--image-size", "32"]) == 1
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and str(path) in line
    assert not out.exists()


def test_wrong_weights_are_refused(
    janus: JanusVQVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete, path = dict(janus.state_dict()), tmp_path / "vq.safetensors"
    name = "decoder.mid.block_1.conv1.weight"
    for weights, message in (
        ({n: w for n, w in complete.items() if n != name}, "decoder.middle.0.conv1.weight missing"),
        ({n: w for n, w in complete.items() if "decoder" not in n}, "not a complete tokenizer"),
        ({**complete, "encoder.extra.weight": torch.ones(1)}, "encoder.extra.weight unknown"),
        (
            {**complete, name: complete[name][:3]},
            "has shape (3, 64, 3, 3), expected (64, 64, 3, 3)",
        ),
        ({"layer.weight": torch.ones(1)}, "not the weights of"),
    ):
        save_file({n: w.contiguous() for n, w in weights.items()}, path)
        refused(path, message, capsys)
    path.write_bytes(path.read_bytes()[:20])
    refused(path, "cannot be read as safetensors", capsys)
    refused(tmp_path / "none.pt", "no such file", capsys)


def test_a_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "callbacks": Hostile()}, path)
    refused(path, "making one could run code", capsys)
    assert not Path("/tmp/multimodal-was-here").exists()
    path.write_bytes(b"not a checkpoint")
    refused(path, "not a torch checkpoint", capsys)
    torch.save([torch.ones(1)], path)
    refused(path, "expected named tensors", capsys)
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.ones(8, 3)}}, path)
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):  # flipped bytes and cut ends: the error is always one line
        damaged = bytearray(content[: rng.randrange(1, len(content))])
        for _ in range(rng.randrange(4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        refused(path, "", capsys)
