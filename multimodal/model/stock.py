"""Decoders of other toolkits, in and out: Qwen3, Qwen3-MoE, Qwen2, Llama (SmolLM2 too), Mistral.

A family is a stock class of transformers and what its attention has. The names of the weights are
the same in all of them, so nothing is converted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from multimodal.files import read_json
from multimodal.hub.names import find_model
from multimodal.memory import check_memory
from multimodal.model.layers.attention import QKNorm
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.layers.rope import Rope, RopeScaling
from multimodal.model.layers.transformer import SIZES, Transformer, TransformerConfig
from multimodal.schemas import Between, Positive, check_value, construct
from multimodal.tokenizers.gguf import gguf_alone
from multimodal.tokenizers.weights import load_weights, read_config_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 2**24  # bytes
MAX_LAYERS = 256
COMPUTED = ".rotary_emb.inv_freq"  # older Llamas store it; it follows from the config
Size = Annotated[int, Between(1, 2**24)]


@dataclass(frozen=True)
class Family:
    """A stock class.

    Attributes:
        stock_class: its name in transformers.
        qk_norm, attention_bias: as in ``TransformerConfig``.
        experts: whether it has experts.
    """

    stock_class: str
    qk_norm: QKNorm
    attention_bias: bool
    experts: bool = False


# By the model_type of config.json. An export is the first family that fits.
FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="rms", attention_bias=False),
    "qwen2": Family("Qwen2ForCausalLM", qk_norm="none", attention_bias=True),
    "llama": Family("LlamaForCausalLM", qk_norm="none", attention_bias=False),
    "mistral": Family("MistralForCausalLM", qk_norm="none", attention_bias=False),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm="rms", attention_bias=False, experts=True),
}
# What the transformer of this package does not have, with the values that turn it off.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
# Of experts, with what the class of transformers assumes where they are absent.
EXPERTS: dict[str, Any] = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "mlp_only_layers": (),
    "router_aux_loss_coef": 0.001,
}
NUMBERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def family_of(config: TransformerConfig) -> tuple[str, Family]:
    """The stock model_type and class of a transformer.

    Raises:
        ValueError: if no stock class has this attention.
    """
    for model_type, family in FAMILIES.items():
        has = family.qk_norm, False, family.attention_bias, family.experts
        needs = config.qk_norm, config.norm_after, config.attention_bias
        if has == (*needs, config.experts is not None):
            return model_type, family
    raise ValueError(
        f"no stock class has qk_norm={config.qk_norm}, norm_after={config.norm_after}, "
        f"attention_bias={config.attention_bias} and experts={config.experts}"
    )


def stock_config(config: TransformerConfig) -> dict[str, Any]:
    """``config.json`` of the stock class, with RoPE as transformers 4 and 5 each write it."""
    model_type, family = family_of(config)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = None
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.stored()
        rope |= scaling
    return {
        "architectures": [family.stock_class],
        "model_type": model_type,
        **{name: getattr(config, name) for name in NUMBERS},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        **_stock_experts(config.experts),
    }


def _stock_experts(experts: ExpertsConfig | None) -> dict[str, Any]:
    """What ``config.json`` of a stock class with experts has besides."""
    if experts is None:
        return {}
    stock = {name: getattr(experts, name) for name in EXPERTS}
    return {**stock, "decoder_sparse_step": 1, "output_router_logits": False}


def _experts_config(config: Mapping[str, Any]) -> ExpertsConfig:
    """The reverse of ``_stock_experts``. Raises ``ValueError``."""
    stored = {name: config.get(name, default) for name, default in EXPERTS.items()}
    # transformers 5 writes the number under another name.
    stored["num_experts"] = config.get("num_local_experts", stored["num_experts"])
    stored["mlp_only_layers"] = stored["mlp_only_layers"] or ()
    step, layers = config.get("decoder_sparse_step", 1), config["num_hidden_layers"]
    check_value("decoder_sparse_step", step, Size)
    check_value("num_hidden_layers", layers, Size)
    check_value("mlp_only_layers", stored["mlp_only_layers"], Sequence[int])
    skipped = [number for number in range(min(layers, MAX_LAYERS)) if (number + 1) % step]
    stored["mlp_only_layers"] = [*stored["mlp_only_layers"], *skipped]
    return construct(ExpertsConfig, stored)


def transformer_config(config: Mapping[str, Any], name: str) -> TransformerConfig:
    """The reverse of ``stock_config``, of any of the families.

    A model whose attention sees a sliding window is read with at most so many tokens: within them
    the window changes nothing.

    Args:
        config: what config.json holds.
        name: of the model, for errors.

    Raises:
        ValueError: for another family, unsupported features or wrong values.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{name}: a model of type {model_type!r:.80}, expected one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    other = [key for key, off in UNSUPPORTED.items() if config.get(key, off[0]) not in off]
    if config.get("attention_bias", False) and not family.attention_bias:
        other.append("attention_bias")
    if other:
        raise ValueError(f"{name}: its {', '.join(sorted(other))} is not supported")
    if config.get("auto_map"):
        raise ValueError(f"{name}: its auto_map names code of its own, and none is run here")
    try:
        theta, scaling = _rope(config)
        if missing := [key for key in NUMBERS if key not in config]:
            raise ValueError(f"{missing[0]}: is missing")
        sizes = {key: config[key] for key in NUMBERS}
        for key in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
            check_value(key, sizes[key], Size)
        heads = sizes["num_attention_heads"]
        # Absent, it is what the class of transformers assumes.
        if window := model_type == "mistral" and config.get("sliding_window", 4096):
            check_value("sliding_window", window, Size)
            sizes["max_position_embeddings"] = min(window, sizes["max_position_embeddings"])
        return construct(
            TransformerConfig,
            {
                **sizes,
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "head_dim": config.get("head_dim") or sizes["hidden_size"] // heads,
                # Absent, it is what the class of transformers assumes.
                "tie_word_embeddings": config.get("tie_word_embeddings", False),
                "rope_theta": theta,
                "qk_norm": family.qk_norm,
                "attention_bias": family.attention_bias,
                "rope_scaling": scaling,
                "experts": _experts_config(config) if family.experts else None,
            },
        )
    except ValueError as error:
        raise ValueError(f"{name}: config.json: {error}") from error


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base and the scaling of RoPE.

    transformers 4 writes ``rope_scaling``, and 5 ``rope_parameters``. Where both are given,
    transformers reads the first alone, so the second must not say otherwise. Raises ``ValueError``.
    """
    keys, read = ("rope_scaling", "rope_parameters"), []
    for key in keys:
        check_value(key, config.get(key), dict[str, Any] | None)
    for rope in [config[key] for key in keys if config.get(key)] or [{}]:
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("its partial_rotary_factor is not supported")
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        check_value("rope_theta", theta, Positive)
        read.append((float(theta), RopeScaling.of(rope)))
    if read[0] != read[-1]:
        raise ValueError("its rope_scaling and its rope_parameters differ: keep one of them")
    return read[0]


def read_stock(path: str | Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read a Hugging Face folder, our own model folder, or a GGUF file.

    Returns:
        The config, and the weights by their stock names in the dtype in which they are stored.

    Raises:
        ValueError: for another kind of model, unsupported features, or weights that are not
            safetensors.
    """
    path = Path(path)
    read = _read_gguf(path) if path.is_file() else (read_sizes(path), read_weights(path))
    config, weights = read
    try:
        check_weights(config, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, weights


def read_sizes(folder: Path) -> TransformerConfig:
    """The sizes of a Hugging Face folder or of our own model folder, without its weights.

    Raises:
        ValueError: for other folders.
    """
    stored = read_config_file(folder / "config.json")
    if "model_type" in stored or "transformer" not in stored:
        return transformer_config(stored, str(folder))
    try:
        sizes = construct(TransformerConfig, stored["transformer"])
        if sizes.weight_bits is not None:
            raise ValueError("its weights are integers: take the model that it was made of")
    except ValueError as error:
        raise ValueError(f"{folder}: config.json: {error}") from error
    return sizes


def language_model(size: str | Path) -> Path | None:
    """The place of the language model that ``size`` names. None: a named size, or nothing."""
    path = None if size in SIZES else find_model(size)
    return path if path is not None and path.exists() else None


def refuse_exports(path: Path) -> None:
    """Raise ``ValueError`` for a folder of ``multimodal export hf``: its vocabulary has codes."""
    if (path / "config.json").is_file() and "image_levels" in read_config_file(
        path / "config.json"
    ):
        raise ValueError(
            f"{path}: has image codes, as an export of this toolkit. A training goes on from it by "
            f"`multimodal import {path} MODEL` and --init_from MODEL"
        )


def check_weights(config: TransformerConfig, weights: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with what a config says, before a transformer is made of it.

    Args:
        weights: by their stock names. Of tied embeddings the head may be there, too.

    Raises:
        ValueError: names a weight.
    """
    with torch.device("meta"):  # shapes alone
        expected = Transformer(config).stock_state_dict()
    given = dict(weights)
    if config.tie_word_embeddings:
        given.pop("lm_head.weight", None)
    for name in [*expected, *given]:
        has, says = (tuple(w[name].shape) if name in w else None for w in (given, expected))
        if has != says:
            raise ValueError(
                f"its weights and its config.json differ: {name!r:.80} has shape {has}, expected "
                f"{says}"
            )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder, in the dtype in which they are stored.

    As in transformers, an index counts only where the weights are not in one file.

    Raises:
        ValueError: if they are not safetensors of this folder.
    """
    names = [WEIGHTS]
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        index = read_json(folder / INDEX, MAX_INDEX)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(n, str) for n in files.values()):
            raise ValueError(f"{folder / INDEX}: weight_map: expected the file of each weight")
        names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{folder}: {INDEX} names {outside[0]!r:.80}, which lies outside")
    stored = {k: v for name in names for k, v in load_weights(folder / name).items()}
    return {name: weight for name, weight in stored.items() if not name.endswith(COMPUTED)}


def _read_gguf(file: Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    try:
        return _of_gguf(file)
    except Exception as error:  # the readers of others raise what comes
        raise ValueError(f"{file}: not a readable GGUF model: {error}") from error


def _of_gguf(file: Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read by transformers, which turns quantized weights into floats."""
    with gguf_alone(file) as alone:
        import gguf
        import transformers

        reader = gguf.GGUFReader(file)
        config = transformers.AutoConfig.from_pretrained(**alone)
        family = f"{reader.fields['general.architecture'].contents()}."
        fields = {
            name.removeprefix(family): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(family)
        }
        if "attention.key_length" in fields:  # transformers does not read it for all
            config.head_dim = int(fields["attention.key_length"])
        stored = {**config.to_dict(), "quantization_config": None}  # it becomes floats
        sizes = transformer_config(stored, "its header")
        if sizes.experts is not None:
            raise ValueError("experts are not read from GGUF; take its safetensors")
        sizes = replace(sizes, rope_scaling=_gguf_scaling(reader, fields, sizes))
        _check_gguf_sizes(reader, sizes)
        model = transformers.AutoModelForCausalLM.from_pretrained(**alone, config=config)
    weights = dict(model.state_dict())
    if sizes.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return sizes, weights


def _gguf_scaling(
    reader: Any, fields: Mapping[str, Any], sizes: TransformerConfig
) -> RopeScaling | None:
    """How a GGUF file stretches positions, which transformers does not read.

    Args:
        fields: of its header, without the name of the family.

    Raises:
        ValueError: if it does so in another way than we do.
    """
    if fields.get("rope.dimension_count", sizes.head_dim) != sizes.head_dim:
        raise ValueError("it rotates a part of each head, which is not supported")
    kind = fields.get("rope.scaling.type", "linear")  # of llama.cpp, where none is named
    factor = float(fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 1.0)))
    slower = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    stretched = kind == "linear" and factor not in (0, 1)
    if kind not in ("none", "linear") or (slower and stretched):
        raise ValueError(f"RoPE of type {kind!r:.80} is not supported")
    if slower:
        plain = Rope(sizes.head_dim, sizes.rope_theta).frequencies()
        factors = torch.from_numpy(slower[0].copy())
        if factors.shape != plain.shape or factors.dtype != torch.float32:
            raise ValueError("its factors of RoPE are not one for each rotation")
        return RopeScaling.of_factors(factors, plain)
    return RopeScaling("linear", factor) if stretched else None


def _check_gguf_sizes(reader: Any, sizes: TransformerConfig) -> None:
    """Refuse sizes that are not those of the weights, before a model of these sizes is made."""
    with torch.device("meta"):
        expected = sum(w.numel() for w in Transformer(sizes).stock_state_dict().values())
    stored = sum(int(t.n_elements) for t in reader.tensors if t.name != "rope_freqs.weight")
    if stored != expected:
        raise ValueError(f"its sizes make {expected:,} numbers, and its weights are {stored:,}")
    check_memory(8 * stored, "reading it as floats")
