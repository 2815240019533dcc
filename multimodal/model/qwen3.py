"""Read the sizes and weights of a Qwen3 folder of Hugging Face, to start a model from."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from multimodal.model.transformer import TransformerConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Features that the transformer of this package does not have, with the value that turns them off.
UNSUPPORTED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def read_qwen3(folder: str | Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read a folder.

    Returns:
        The config, and the weights by their stock names in the dtype in which they are stored.

    Raises:
        ValueError: for another kind of model, unsupported features, or weights that are not
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
    if other := {name for name, off in UNSUPPORTED.items() if config.get(name, off) != off}:
        raise ValueError(f"{folder}: its {', '.join(sorted(other))} is not supported")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: its RoPE of type {rope['rope_type']!r} is not supported")
    try:
        sizes = TransformerConfig(
            **{name: config[name] for name in SIZES},
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        )
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
