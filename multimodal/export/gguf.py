"""Export a model folder as one GGUF file, for llama.cpp and what is built on it.

The file has the weights and the tokenizer of the stock folder (multimodal/export/hf.py): an image
is tokens there too. Images become codes and back with the image tokenizer of the model folder.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from multimodal.export.hf import chat_template, exported_tokenizer
from multimodal.export.q4_k import BLOCK, quantize_q4_k
from multimodal.files import atomic_file, local_path
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.rope import Rope
from multimodal.model.layers.transformer import TransformerConfig
from multimodal.model.stock import family_of
from multimodal.tokenizers.text import NORMALIZER

DTYPES = ("float32", "float16", "bfloat16", "q8_0", "q4_k")
TABLES = ("token_embd", "output.")
FINER = {"q8_0": "float16", "q4_k": "q8_0"}  # what tables have: the head decides between near words
# How a text is split before BPE, by the name that llama.cpp has for the regular expression.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": rf"{_LETTERS}|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
}


def export_gguf(source: str | Path, out: str | Path, dtype: str = "float16") -> None:
    """Write a model folder as a GGUF file. It appears complete or not at all.

    Its metadata have the texts of the folder's LICENSE and sources.json (``multimodal.LICENSE``).

    Args:
        source: a model folder, or the name of a bundled model.
        out: a new file.
        dtype: of the matrices, one of DTYPES. ``q8_0`` has 8 bits a weight and a scale for each 32,
            and float16 for the embeddings and the head. Rows that are no multiple of 32 stay in
            float16. ``q4_k`` has 4.5 bits, and ``q8_0`` for the embeddings and the head. Rows that
            are no multiple of 256 have 5.5 bits (``q5_0``), as llama.cpp does it. Norms are
            float32.

    Raises:
        ValueError: for another dtype, a file that exists, a tokenizer that llama.cpp does not have,
            or without the package gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF needs: pip install multimodal[gguf] ({error})") from error
    out = local_path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"{out}: exists; name a new file")
    folder = find_model(source)
    model = ModelParts.load(folder).dequantized()
    config = model.config.transformer
    name, _ = family_of(config)
    if config.experts is not None:
        raise ValueError(f"{source}: experts are not written as GGUF; `export hf` writes them")
    if name != "llama" and _slows_gradually(config):
        raise ValueError(f"{source}: llama.cpp has RoPE of type llama3 for a llama, not for {name}")
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as part:
        writer = gguf.GGUFWriter(part, name)
        writer.add_name(folder.resolve().name)
        _add_sizes(writer, config)
        _add_tokenizer(writer, model)
        if model.provenance.licenses:
            writer.add_license_name(model.provenance.license_name)
        for file, text in model.provenance.texts().items():
            writer.add_string(f"multimodal.{file}", text)
        for stock_name, weight in model.network.transformer.stock_state_dict().items():
            short = names.get_name(stock_name, try_suffixes=(".weight", ".bias"))
            assert short is not None, stock_name
            bits = FINER.get(dtype, dtype) if short.startswith(TABLES) else dtype
            data, kind = _stored(_arranged(stock_name, weight, config, name), bits)
            writer.add_tensor(short, data, raw_dtype=kind)
        if _slows_gradually(config):
            writer.add_tensor("rope_freqs.weight", _slower_by(config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_sizes(writer: Any, config: TransformerConfig) -> None:
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def split_of(tokenizer: dict[str, Any]) -> str:
    """The name that llama.cpp has for how a tokenizer splits texts before BPE.

    Args:
        tokenizer: what its tokenizer.json holds.

    Raises:
        ValueError: if there is none.
    """
    normal = (tokenizer.get("normalizer") or {}).get("type")
    if normal not in (None, "NFC"):  # llama.cpp reads texts as they are; most are in NFC
        raise ValueError(f"llama.cpp does not normalize texts as this tokenizer does ({normal})")
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    kinds = [step.get("type") for step in steps]
    *before, last = steps
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space", True):
        words = last.get("use_regex", True)
        if not before and words:
            return "gpt-2"
        if kinds[:-1] == ["Digits"] and before[0].get("individual_digits") and words:
            return "smollm"
        if kinds[:-1] == ["Split"] and not words:
            how = (before[0].get("behavior"), before[0].get("invert", False))
            expression = before[0].get("pattern", {}).get("Regex")
            for name, known in SPLITS.items():
                if expression == known and how == ("Isolated", False):
                    return name
    raise ValueError(f"llama.cpp has no name for how this tokenizer splits texts ({kinds})")


def _add_tokenizer(writer: Any, model: ModelParts) -> None:
    import gguf

    tokenizer, vocabulary = exported_tokenizer(model), model.vocabulary
    splits, types = split_of(tokenizer), gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(vocabulary.size)]
    kinds = [types.UNUSED] * vocabulary.size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = token, types.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = types.CONTROL if token["special"] else types.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_pad_token_id(vocabulary.pad)
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "none")
    writer.add_string(NORMALIZER, normalizer)
    writer.add_add_bos_token(False)  # a prompt begins with <bos>, as for every engine
    if (chat := model.text_tokenizer.chat) is not None:
        writer.add_chat_template(chat_template(chat))
        turn = model.text_tokenizer.turn_end
        writer.add_eot_token_id(vocabulary.eos if turn is None else turn)


def _arranged(
    name: str, weight: Tensor, config: TransformerConfig, family: str
) -> NDArray[np.float32]:
    """A weight as llama.cpp reads it.

    For a llama it rotates neighbouring numbers of a head, not those of its two halves: the rows of
    queries and keys change places.
    """
    data: NDArray[np.float32] = weight.float().numpy()
    if family != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return data
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = data.reshape(heads, 2, config.head_dim // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)


def _stored(data: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], Any]:
    """The bytes of a tensor, and their type."""
    import gguf

    types = gguf.GGMLQuantizationType
    if data.ndim < 2 or dtype == "float32":
        return data, types.F32
    if dtype in ("q8_0", "q4_k") and data.shape[-1] % 32:
        dtype = "float16"
    if dtype == "q4_k" and data.shape[-1] % BLOCK == 0:
        return quantize_q4_k(data), types.Q4_K
    kinds = {"float16": types.F16, "bfloat16": types.BF16, "q8_0": types.Q8_0, "q4_k": types.Q5_0}
    return gguf.quants.quantize(data, kinds[dtype]), kinds[dtype]


def _slows_gradually(config: TransformerConfig) -> bool:
    """Whether each rotation is slower by a factor of its own."""
    return config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3"


def _slower_by(config: TransformerConfig) -> NDArray[np.float32]:
    """By how much each rotation is slower: float32[d / 2]."""
    plain = Rope(config.head_dim, config.rope_theta)
    factors: NDArray[np.float32] = (plain.frequencies() / config.rope.frequencies()).numpy()
    return factors
