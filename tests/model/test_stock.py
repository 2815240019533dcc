"""Language models of other toolkits in and out: the same logits, ids, greedy texts and weights."""

import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.api import Model, load
from multimodal.export.hf import export_hf
from multimodal.inference.text import generate_ids
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.rope import RopeScaling
from multimodal.model.layers.transformer import TransformerConfig
from multimodal.model.stock import FAMILIES, read_stock, stock_config, transformer_config
from multimodal.options import TextOptions
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from tests.layouts import hostile_strings

SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 24, "rope_theta": 1e6}),
    "qwen3 moe": ("Qwen3Moe", {"head_dim": 24, **EXPERTS, "norm_topk_prob": True}),
    "some layers moe": (
        "Qwen3Moe",
        {
            "tie_word_embeddings": True,
            **EXPERTS,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama long": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
}


class Pair:
    """A random stock model, ours that starts from it, and the stock model that ours is exported as.

    Attributes:
        folder: of the stock model. ours: started from it. out: the folder of the export.
    """

    def __init__(self, kind: str, folder: Path, sentences: list[str], images: Path) -> None:
        family, options = KINDS[kind]
        self.family = family
        text = TextTokenizer.train(sentences * 4, 300)
        made = tokenizers.Tokenizer.from_str(text.to_json())
        if family.startswith("Qwen"):  # transformers reads a file of these as if it had it
            made.normalizer = tokenizers.normalizers.NFC()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
        tokenizer.save_pretrained(folder / "stock")
        torch.manual_seed(0)
        options = {"rope_theta": 10000.0, "tie_word_embeddings": False, **options}
        config = getattr(transformers, f"{family}Config")(vocab_size=320, **SIZES | options)
        self.stock = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in self.stock.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        self.stock.save_pretrained(folder / "stock")
        self.folder, self.out = folder / "stock", folder / "out"
        self.ours = Model.new(
            str(self.folder), TextTokenizer.load(self.folder), load_image_tokenizer(images)
        ).eval()
        self.ours.save(folder / "ours")
        self.stock_class = export_hf(folder / "ours", self.out)
        self.exported = transformers.AutoModelForCausalLM.from_pretrained(self.out).eval()


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    sentences: tuple[str, ...], tiny_model_folder: Path,
) -> Pair:  # fmt: skip
    folder = tmp_path_factory.mktemp("stock")
    return Pair(request.param, folder, [*sentences], tiny_model_folder / "image_tokenizer")


@torch.inference_mode()
def logits_of(model: Model, ids: Tensor) -> Tensor:
    """int64[B, L] -> float32[B, L, V]"""
    documents = torch.ones_like(ids)
    mask = attention_mask(documents, torch.zeros_like(ids))
    transformer = model.network.transformer
    return transformer.logits(transformer(ids, documents.cumsum(1) - 1, mask))


def test_logits_are_those_of_the_stock_class_in_and_out(pair: Pair) -> None:
    ids = torch.randint(300, (3, 60), generator=torch.Generator().manual_seed(1))
    logits = logits_of(pair.ours, ids)
    with torch.inference_mode():
        expected, exported = pair.stock(ids).logits, pair.exported(ids).logits
    assert expected[..., :300].std() > 0.5, "logits that differ enough to compare"
    assert (logits[..., :300] - expected[..., :300]).abs().max() < 1e-4
    assert (logits - exported).abs().max() < 1e-4


def test_the_export_is_the_same_class_with_the_same_weights(pair: Pair) -> None:
    assert type(pair.exported).__name__ == pair.stock_class
    # Mistral without a window is a Llama.
    assert pair.stock_class == type(pair.stock).__name__.replace("Mistral", "Llama")
    before, after = pair.stock.state_dict(), pair.exported.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        rows = 300 if name in ("model.embed_tokens.weight", "lm_head.weight") else len(weight)
        assert torch.equal(weight[:rows], after[name][:rows]), name


def test_ours_to_stock_to_ours_is_equal_to_the_bit(pair: Pair) -> None:
    config, weights = read_stock(pair.out)
    transformer = pair.ours.network.transformer
    assert config == pair.ours.config.transformer
    state = transformer.stock_state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    assert load(pair.folder.parent / "ours").config.transformer == config


def test_greedy_texts_are_those_of_the_stock_class(pair: Pair) -> None:
    """100 prompts, read together and token by token with a cache, as captions are written."""
    rng, vocabulary = random.Random(0), pair.ours.vocabulary
    prompts = [[rng.randrange(300) for _ in range(rng.randint(3, 30))] for _ in range(100)]
    texts = generate_ids(pair.ours, prompts, TextOptions(max_tokens=8))
    grammar = [*range(300, vocabulary.eos), *range(vocabulary.eos + 1, vocabulary.size)]
    width = max(map(len, prompts))
    padded = torch.tensor([[vocabulary.pad] * (width - len(p)) + p for p in prompts])
    inputs = {"input_ids": padded, "attention_mask": (padded != vocabulary.pad).long()}
    output = pair.exported.generate(**inputs, max_new_tokens=8, suppress_tokens=grammar)
    expected = []
    for row in output[:, width:].tolist():
        expected.append(row[: row.index(vocabulary.eos)] if vocabulary.eos in row else row)
    assert texts == expected
    assert len({tuple(text) for text in texts}) > 50


def test_the_tokenizer_gives_the_ids_of_the_stock_tokenizer(pair: Pair) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(pair.folder)
    exported = transformers.AutoTokenizer.from_pretrained(pair.out)
    ours = pair.ours.text_tokenizer
    for text in hostile_strings(1000):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ids == exported(text, split_special_tokens=True)["input_ids"], repr(text)
        normal = unicodedata.normalize("NFC", text) if pair.family.startswith("Qwen") else text
        assert ours.decode(ids) == normal


# --- what cannot be read --------------------------------------------------------------------------


def stored(**others: Any) -> dict[str, Any]:
    config = TransformerConfig(320, 64, 2, 4, 2, 16, 96, qk_norm="none")
    return stock_config(config) | others


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"model_type": "gpt2"}, "a model of type 'gpt2', expected one of qwen3, qwen2, llama"),
        ({"model_type": ["llama"]}, "a model of type"),
        ({"attention_bias": True}, "its attention_bias is not supported"),
        ({"mlp_bias": True, "hidden_act": "gelu"}, "its hidden_act, mlp_bias is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"hidden_size": "big"}, "hidden_size|not supported between|unsupported operand"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
    ],
)
def test_what_the_transformer_does_not_have_is_refused(
    others: dict[str, Any], message: str
) -> None:
    config = stored(**others)
    config.pop("head_dim")
    config.pop("rope_parameters" if "rope_scaling" in others else "rope_scaling")  # as theirs have
    with pytest.raises(ValueError, match=message):
        transformer_config(config, "theirs")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (YARN, "RoPE of type 'yarn' is not supported"),
        ({"type": "linear", "factor": 4.0}, "rope_scaling and its rope_parameters differ"),
        ({"rope_type": "default"}, "rope_scaling and its rope_parameters differ"),  # another theta
    ],
)
def test_a_scaling_beside_the_rope_parameters_is_not_dropped(
    scaling: dict[str, Any], message: str
) -> None:
    """Added by hand to what transformers 5 saved, which reads it alone."""
    saved = transformers.Qwen3Config(**SIZES, rope_parameters={"rope_theta": 1e6}).to_dict()
    assert "rope_theta" not in saved and transformer_config(saved, "m").rope_theta == 1e6
    added = json.loads(json.dumps(saved)) | {"rope_scaling": scaling}
    read = transformers.Qwen3Config.from_dict(added).rope_parameters
    assert read["rope_type"] == scaling.get("rope_type", "linear")
    with pytest.raises(ValueError, match=message):
        transformer_config(added, "m")
    same = {"rope_scaling": LINEAR, "rope_parameters": LINEAR}
    assert transformer_config(saved | same, "m").rope_scaling == RopeScaling("linear", 4.0)


def test_a_sliding_window_limits_how_much_is_read() -> None:
    config = stored(model_type="mistral", sliding_window=128)
    assert transformer_config(config, "m").max_position_embeddings == 128
    absent = stored(model_type="mistral", max_position_embeddings=8192)
    absent.pop("sliding_window", None)
    assumed = transformers.MistralConfig.from_dict(absent).sliding_window
    assert transformer_config(absent, "m").max_position_embeddings == assumed == 4096
    whole = config | {"sliding_window": None}
    assert transformer_config(whole, "m").max_position_embeddings == 4096


def test_every_family_is_what_its_class_is() -> None:
    for model_type, family in FAMILIES.items():
        config = transformer_config(stored(model_type=model_type), model_type)
        assert (config.qk_norm, config.attention_bias) == (family.qk_norm, family.attention_bias)
        assert hasattr(transformers, family.stock_class)
    scaling = RopeScaling("llama3", 8.0)
    config = TransformerConfig(320, 64, 2, 4, 2, 16, 96, qk_norm="none", rope_scaling=scaling)
    again = transformer_config(json.loads(json.dumps(stock_config(config))), "again")
    assert again == config


def test_what_older_llamas_store_beside_their_weights_is_not_read(
    pair: Pair, tmp_path: Path
) -> None:
    shutil.copytree(pair.out, tmp_path / "old")
    weights = load_file(tmp_path / "old/model.safetensors")
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(weights | computed, tmp_path / "old/model.safetensors")
    config, read = read_stock(tmp_path / "old")
    expected, same = read_stock(pair.out)
    assert config == expected and read.keys() == same.keys()


def test_a_stale_index_does_not_hide_the_weights(pair: Pair, tmp_path: Path) -> None:
    """As transformers reads a folder that had its weights in parts before."""
    shutil.copytree(pair.out, tmp_path / "again")
    _, weights = read_stock(pair.out)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(zeros, tmp_path / "again/part.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    (tmp_path / "again/model.safetensors.index.json").write_text(json.dumps(index))
    _, read = read_stock(tmp_path / "again")
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    (tmp_path / "again/model.safetensors").unlink()
    _, parts = read_stock(tmp_path / "again")
    assert not any(weight.any() for weight in parts.values())


def test_weights_outside_the_folder_or_missing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(stored()))
    with pytest.raises(ValueError, match="model.safetensors: no such file"):
        read_stock(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path.parent / "other.safetensors")
    with pytest.raises(ValueError, match="which lies outside"):
        read_stock(tmp_path)
    assert load_file(tmp_path.parent / "other.safetensors")
