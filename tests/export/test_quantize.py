"""``multimodal quantize``: a model folder with fewer bits is used like any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal import load
from multimodal.cli import main
from multimodal.export.hf import export_hf
from multimodal.export.model import export_model
from multimodal.export.quantize import quantize_model
from multimodal.inference.text import generate_ids
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.quantization import dequantized
from multimodal.model.layers.transformer import Transformer
from multimodal.model.stock import read_stock
from multimodal.options import TextOptions


@pytest.fixture(scope="module", params=["int8", "int4"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
) -> Path:
    out = tmp_path_factory.mktemp("quantized") / request.param
    assert main(["quantize", str(tiny_model_folder), str(out), "--to", request.param]) == 0
    return out


def logits(transformer: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        mask = attention_mask(torch.ones_like(ids), torch.zeros_like(ids))
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return transformer.logits(transformer(ids, positions, mask))


def test_a_folder_says_how_it_is_quantized_and_from_what(
    folder: Path, tiny_model_folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["transformer"]["weight_bits"] == int(folder.name[3:])
    source = load(tiny_model_folder)
    (written,) = json.loads((folder / "sources.json").read_text("utf-8"))["sources"]
    assert (written["kind"], written["fingerprint"]) == ("model", source.fingerprint)
    assert written["name"] == str(tiny_model_folder)
    assert source.fingerprint in (folder / "README.md").read_text("utf-8")
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".ckpt")]
    bits = {"int8": (8, 8.6), "int4": (4, 6.2)}[folder.name]  # the vocabulary keeps 8
    stored = load_file(folder / "model.safetensors")
    inner = {name: w for name, w in stored.items() if "_proj" in name}
    numbers = sum(
        p.numel() for n, p in source.network.transformer.named_parameters() if "_proj" in n
    )
    size = 8 * sum(w.numel() * w.element_size() for w in inner.values()) / numbers
    assert bits[0] <= size <= bits[0] + 0.6


def test_it_is_near_the_model_it_was_made_of(folder: Path, tiny_model_folder: Path) -> None:
    source, smaller = load(tiny_model_folder), load(folder)
    ids = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    theirs = logits(source.network.transformer, ids)
    ours = logits(smaller.network.transformer, ids)
    error = (ours - theirs).norm() / (theirs - theirs.mean()).norm()
    assert error < (0.05 if folder.name == "int8" else 0.3)
    # Noise of the size of the rounding moves the logits as far. int8 rounds inputs as much, too.
    rounded, noisy = dequantized(smaller.network.transformer.state_dict()), load(tiny_model_folder)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in noisy.network.transformer.named_parameters():
            noise = torch.randn(weight.shape, generator=dice)
            weight.add_(noise * (rounded[name] - weight).norm() / noise.norm())
    moved = (logits(noisy.network.transformer, ids) - theirs).norm()
    assert (ours - theirs).norm() < (1.6 if folder.name == "int8" else 1.2) * moved
    half = logits(load(folder, dtype="bfloat16").network.transformer, ids)
    assert (half - ours).norm() / ours.norm() < 0.05


def test_the_step_with_a_cache_agrees_with_the_whole_sequence(folder: Path) -> None:
    transformer = load(folder).network.transformer
    ids = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    whole = logits(transformer, ids)
    cache = transformer.empty_cache(3, 9)
    for token in range(9):
        keys, values = cache.columns(slice(0, token + 1))
        position = torch.full((3, 1), token)
        with torch.inference_mode():
            state = transformer.forward_token(
                ids[:, token], position, None, keys, values, torch.tensor([token])
            )
            step = transformer.logits(state)
        # Rounding to int8 makes more of the last bits of attention.
        assert (step - whole[:, token]).norm() < 0.02 * whole[:, token].norm()


def test_texts_drawings_and_vectors_come_of_it(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    model = load(folder)
    picture = Image.new("RGB", (40, 30), "red")
    assert isinstance(model.caption(picture), str)
    (drawn,) = model.draw("a red bus", n=1, seed=0)
    assert drawn.size == (32, 32)
    drawn = model.draw("a red bus", n=1, seed=0, method="masked", steps=2)[0]
    assert drawn.size == (32, 32)
    assert model.embed(picture).norm() == pytest.approx(1, abs=1e-4)
    prompts = [[model.vocabulary.bos, 5, 6], [model.vocabulary.bos, 7]]
    together = generate_ids(model, prompts, TextOptions(max_tokens=6))
    assert together == [generate_ids(model, [p], TextOptions(max_tokens=6))[0] for p in prompts]
    assert "16 parameters" not in repr(model)


def test_what_is_saved_again_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = ModelParts.load(folder)
    model.save(tmp_path / "again", dtype=torch.bfloat16)
    assert ModelParts.load(tmp_path / "again").fingerprint == model.fingerprint
    for name in ("model.safetensors", "heads.safetensors"):
        first, second = load_file(folder / name), load_file(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from safetensors.torch import save_file

    copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] ^= 1
    save_file(weights, file)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "copy")
    del weights["model.embed_tokens.columns"]
    save_file(weights, file)
    with pytest.raises(ValueError, match="1 weights are missing"):
        load(tmp_path / "copy")


def test_exports_have_its_numbers_as_floats(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multimodal.model.layers.quantization.INTEGER_PRODUCTS", False)
    export_hf(folder, tmp_path / "stock")
    config, weights = read_stock(tmp_path / "stock")
    stock = Transformer(config)
    stock.load_stock_state_dict(weights)
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    ours = logits(load(folder).network.transformer, ids)
    torch.testing.assert_close(logits(stock.eval(), ids), ours, rtol=1e-3, atol=1e-4)
    export_model(folder, tmp_path / "floats", "float32")
    plain = load(tmp_path / "floats")
    assert plain.config.transformer.weight_bits is None
    torch.testing.assert_close(logits(plain.network.transformer, ids), ours, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_done_is_one_sentence(
    folder: Path, tiny_model_folder: Path, tmp_path: Path, tiny_model
) -> None:  # type: ignore[no-untyped-def]
    bits = folder.name[3:]
    with pytest.raises(ValueError, match=f"is quantized already, to {bits} bits"):
        quantize_model(folder, tmp_path / "twice")
    with pytest.raises(ValueError, match="to='int2': expected one of int8, int4"):
        quantize_model(tiny_model_folder, tmp_path / "new", "int2")  # type: ignore[arg-type]
    assert not (tmp_path / "twice").exists() and not (tmp_path / "new").exists()
    network = tiny_model().network
    with pytest.raises(ValueError, match=f"has {bits} bits|weights have {bits} bits.*needs floats"):
        network.take_weights(load(folder).network)
