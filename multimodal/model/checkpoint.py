"""The folder of a model: what is written, and read back.

config.json  model.safetensors  heads.safetensors  text_tokenizer.json  image_tokenizer/  README.md
"""

import copy
import json
import textwrap
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from multimodal.files import atomic_folder
from multimodal.model.network import ModelConfig, Multimodal
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.templates import Templates
from multimodal.model.transformer import TransformerConfig
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer

FORMAT_VERSION = 1
BUNDLED = ("starter",)
DEFAULT_CARD = "# A model of the multimodal toolkit\n\nNo card was written for this model.\n"


def save(
    model: Multimodal, folder: Path, card: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """Write a model folder; ``card`` is its README.md; dtype: what weights are rounded to.

    The image tokenizer stays in fp32: rounded, it would give other codes than in training.
    """
    with atomic_folder(folder) as part:
        _write(model, part, dtype)
        if card or not (folder / "README.md").exists():
            (part / "README.md").write_text(card or DEFAULT_CARD)


def _write(model: Multimodal, folder: Path, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        model = copy.deepcopy(model)
        for part in (model.transformer, model.alignment):
            part.to(dtype).float()  # so that the fingerprint is that of what will be loaded
    weights = model.transformer.stock_state_dict()
    save_file({name: w.to(dtype) for name, w in weights.items()}, folder / "model.safetensors")
    heads = model.alignment.state_dict()
    save_file(
        {name: w.contiguous().to(dtype) for name, w in heads.items()}, folder / "heads.safetensors"
    )
    model.text_tokenizer.save(folder / "text_tokenizer.json")
    model.image_tokenizer.save(folder / "image_tokenizer")
    config = {
        "format": FORMAT_VERSION,
        **asdict(model.config),
        "preprocessing": {
            "image_size": model.image_tokenizer.config.image_size,
            "fit": model.image_tokenizer.config.fit,
        },
        "fingerprints": {
            "model": model.fingerprint,
            "image_tokenizer": model.image_tokenizer.fingerprint,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def find(path: str | Path) -> Path:
    """The folder of a path, or of the name of a bundled model where no such folder is here."""
    folder = Path(path)
    if str(path) in BUNDLED and not folder.is_dir():
        return Path(str(files("multimodal") / str(path)))
    return folder


def part_of(path: str | Path, name: str) -> Path:
    """The file or folder of this name in a model folder or a bundled one; else the path itself."""
    part = find(path) / name
    return part if part.exists() else Path(path)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Errors: ``ValueError`` that says what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not a model folder (config.json is missing)") from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: not the config of a model of this release")
    return config


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Multimodal:
    """Load a model folder, or a bundled model by name, ready for use.

    Errors: ``ValueError`` for anything that is not one.
    """
    folder = find(path)
    stored = read_config(folder)
    try:
        config = ModelConfig(
            TransformerConfig(**stored["transformer"]),
            stored["text_size"],
            stored["codebook_size"],
            ObjectivesConfig(**stored["objectives"]),
            Templates(**stored.get("templates", {})),
        )
        model = Multimodal(
            config,
            TextTokenizer.load(folder / "text_tokenizer.json"),
            load_image_tokenizer(folder / "image_tokenizer"),
        )
        model.transformer.load_stock_state_dict(load_file(folder / "model.safetensors"))
        model.alignment.load_state_dict(load_file(folder / "heads.safetensors"))
        expected = stored["fingerprints"]["image_tokenizer"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error.filename or error} is missing") from error
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 300)  # of other weights torch names every single one
        raise ValueError(f"{folder}: not a model of this release: {reason}") from error
    if model.image_tokenizer.fingerprint != expected:
        raise ValueError(
            f"{folder}: the model was trained with image tokenizer {expected}, "
            f"the folder holds {model.image_tokenizer.fingerprint}"
        )
    # The tokenizer stays in fp32: in bf16 it would pick other codes than in training.
    model.transformer.to(dtype)
    model.alignment.to(dtype)
    return model.to(device).eval()
