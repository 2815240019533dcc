"""A config that does not describe its weights is refused, before memory or minutes are spent."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from multimodal import load
from multimodal.model.layers.transformer import Transformer
from multimodal.model.stock import read_stock, transformer_config


def change(path: Path, keys: str, value: Any) -> None:
    """Set ``config[a][b]`` to the value; keys: ``a.b``."""
    config = json.loads(path.read_text())
    inner = config
    *parents, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "keys",
    [
        "transformer.vocab_size",
        "transformer.hidden_size",
        "transformer.num_hidden_layers",
        "transformer.num_attention_heads",
        "transformer.head_dim",
        "transformer.intermediate_size",
        "transformer.qk_norm",
        "text_size",
        "layout.levels.0.grid",
        "layout.levels.0.groups",
        "layout.levels.0.codebook_size",
        "objectives.alignment_dim",
        "templates.question",
        "image_tokenizer/config.json:autoencoder.dim",
        "image_tokenizer/config.json:autoencoder.heads",
        "image_tokenizer/config.json:autoencoder.decoder_depth",
        "image_tokenizer/config.json:quantizer.levels.0",
        "image_tokenizer/config.json:image_size",
    ],
)
def test_a_model_whose_config_lies_is_refused(
    keys: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    file, _, keys = keys.rpartition(":")
    for number, value in enumerate((10**9, 10**400, 0, "x", {}, None, float("nan"))):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_model_folder, folder)
        change(folder / (file or "config.json"), keys, value)
        try:
            model = load(folder)
        except ValueError:
            continue
        assert keys == "templates.question" and isinstance(value, str), (keys, value, model)


@pytest.mark.parametrize("keys", ["transformer.rms_norm_eps", "objectives.reconstruct_share"])
def test_a_number_that_is_none_is_refused(
    keys: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    for value in (10**400, "x", {}, None, True, float("nan"), float("inf")):
        change(tmp_path / "model/config.json", keys, value)
        with pytest.raises(ValueError, match="expected a"):
            load(tmp_path / "model")


def test_a_config_nested_too_deep_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "model/config.json").write_text("[" * 200_000)
    for read in (load, read_stock):
        with pytest.raises(ValueError, match="config.json"):
            read(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"],
)
def test_a_language_model_whose_config_lies_is_refused(name: str, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "head_dim": 4,
        "tie_word_embeddings": True,
    }  # fmt: skip
    weights = Transformer(transformer_config(config, "honest")).stock_state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_stock(tmp_path)[0].num_hidden_layers == 1
    for lie in (10**9, 4):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: lie}))
        with pytest.raises(ValueError, match="expected a whole|differ|num_|head"):
            read_stock(tmp_path)
