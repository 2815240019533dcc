"""Sizes and weights of a Qwen3 folder of Hugging Face, to start from."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from multimodal.model.transformer import TransformerConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What the transformer of this package has not, and the value that says that it is not used.
PLAIN = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False,
         "rope_scaling": None}  # fmt: skip


def read_qwen3(folder: str | Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """The config and the weights by their stock names, in the precision they are stored in.

    Errors: ``ValueError`` for a folder that holds another kind of model, or weights other than
    safetensors.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a Qwen3 folder: config.json: {error}") from error
    if config.get("model_type") != "qwen3":
        raise ValueError(f"{folder}: a model of type {config.get('model_type')!r}, expected qwen3")
    rope = config.get("rope_parameters") or {}
    if other := {name for name, plain in PLAIN.items() if config.get(name, plain) != plain}:
        raise ValueError(f"{folder}: its {', '.join(sorted(other))} is not known here")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: its RoPE of type {rope['rope_type']!r} is not known here")
    try:
        sizes = TransformerConfig(
            **{name: config[name] for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
                "rms_norm_eps",
            )},
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{folder}: config.json has no {error}") from error
    try:
        names = [WEIGHTS]
        if (folder / INDEX).is_file():
            names = sorted(
                set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
            )
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder}: {INDEX} names {outside[0]!r}, which lies outside")
        weights = {k: v for name in names for k, v in load_file(folder / name).items()}
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error.filename or error} is missing") from error
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder}: its weights are not readable: {error}") from error
    return sizes, weights
