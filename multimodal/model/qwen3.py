"""Read the sizes and weights of a Qwen3 folder of Hugging Face, to start a model from."""

from pathlib import Path

from torch import Tensor

from multimodal.files import read_json
from multimodal.model.transformer import TransformerConfig
from multimodal.schemas import construct
from multimodal.tokenizers.weights import load_weights, read_config_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 2**24  # bytes
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
        config = read_config_file(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{folder}: not a Qwen3 folder: {error}") from error
    if config.get("model_type") != "qwen3":
        raise ValueError(f"{folder}: a model of type {config.get('model_type')!r}, expected qwen3")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{folder}: rope_parameters={rope!r:.80}: expected an object")
    if other := {name for name, off in UNSUPPORTED.items() if config.get(name, off) != off}:
        raise ValueError(f"{folder}: its {', '.join(sorted(other))} is not supported")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: its RoPE of type {rope['rope_type']!r} is not supported")
    try:
        given = {name: config[name] for name in SIZES if name in config}
        given["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        given["rope_theta"] = float(theta) if isinstance(theta, int) else theta
        sizes = construct(TransformerConfig, given)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder}: config.json: {error}") from error
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, MAX_INDEX)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(n, str) for n in files.values()):
            raise ValueError(f"{folder / INDEX}: weight_map: expected the file of each weight")
        names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{folder}: {INDEX} names {outside[0]!r:.80}, which lies outside")
    return sizes, {k: v for name in names for k, v in load_weights(folder / name).items()}
