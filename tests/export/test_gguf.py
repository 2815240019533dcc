"""A GGUF file: the weights, sizes and tokenizer of the model, as other readers find them."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.export.gguf import SPLITS, _stored, export_gguf, split_of
from multimodal.export.hf import export_hf, exported_tokenizer
from multimodal.export.q4_k import quantize_q4_k
from multimodal.model.layers.rope import RopeScaling
from multimodal.model.stock import read_stock
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import ChatFormat, TextTokenizer
from tests.layouts import BYTES, CONTROL, hostile_strings, made_as

SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=512, initializer_range=0.3, head_dim=32,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
KINDS = {"Qwen3": {}, "Qwen2": {}, "Llama": {}, "Llama 3.1": {"rope_parameters": LLAMA3},
         "Llama linear": {"rope_parameters": LINEAR}}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module", params=KINDS)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    sentences: tuple[str, ...], tiny_model_folder: Path,
) -> Path:  # fmt: skip
    """Our model, started from a stock one that can chat."""
    stock, out = tmp_path_factory.mktemp("stock"), tmp_path_factory.mktemp("gguf") / "ours"
    made = json.loads(TextTokenizer.train(list(sentences) * 4, 300).to_json())
    (stock / "tokenizer.json").write_text(json.dumps(made), "utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(stock / "tokenizer.json"))
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(stock)
    torch.manual_seed(0)
    family = request.param.split()[0]
    options: dict[str, Any] = {"rope_theta": 10000.0, **SIZES, **KINDS[request.param]}
    config = getattr(transformers, f"{family}Config")(vocab_size=320, **options)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(stock)
    images = load_image_tokenizer(tiny_model_folder / "image_tokenizer")
    Model.new(str(stock), TextTokenizer.load(stock), images).save(out)
    return out


def tensor_of(file: Path, name: str) -> Tensor:
    reader = gguf.GGUFReader(file)
    found = next(tensor for tensor in reader.tensors if tensor.name == name)
    return torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type)))


def test_what_is_written_is_read_back_to_the_bit(folder: Path, tmp_path: Path) -> None:
    export_gguf(folder, tmp_path / "m.gguf", "float32")
    ours = load(folder)
    config, weights = read_stock(tmp_path / "m.gguf")
    expected = ours.config.transformer
    if expected.rope_scaling is not None and expected.rope_scaling.rope_type == "llama3":
        slower = tensor_of(tmp_path / "m.gguf", "rope_freqs.weight")
        half = expected.head_dim // 2
        wavelengths = 2 * torch.pi * 500000 ** (torch.arange(half) / half)
        assert (slower[wavelengths < 4] == 1).all()
        torch.testing.assert_close(
            slower[wavelengths > 16], torch.full_like(slower[wavelengths > 16], 8.0)
        )
        assert ((slower > 1) & (slower < 8))[(wavelengths > 4.1) & (wavelengths < 15.9)].all()
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    names = [name for name in vars(expected) if name != "rms_norm_eps"]
    assert {n: getattr(config, n) for n in names} == {n: getattr(expected, n) for n in names}
    state = ours.network.transformer.stock_state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], value) for name, value in state.items())


@pytest.mark.parametrize("folder", ["Qwen3"], indirect=True)
def test_a_rope_that_llama_cpp_has_for_a_llama_alone(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    transformer = replace(model.config.transformer, rope_scaling=RopeScaling("llama3", 8.0))
    object.__setattr__(model.config, "transformer", transformer)
    model.save(tmp_path / "slower")
    with pytest.raises(ValueError, match="RoPE of type llama3 for a llama, not for qwen3"):
        export_gguf(tmp_path / "slower", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_the_tokenizer_and_the_chat_template_are_in_the_file(folder: Path, tmp_path: Path) -> None:
    export_gguf(folder, tmp_path / "m.gguf", "bfloat16")
    ours, again = load(folder).text_tokenizer, TextTokenizer.load(tmp_path / "m.gguf")
    assert ours.chat == ChatFormat(TEMPLATE, "<|im_end|>", "<|im_start|>")
    assert again.chat == ChatFormat(TEMPLATE, "<|im_end|>", "<bos>")
    assert len(again) == load(folder).vocabulary.size
    for text in ("a red bus", "naïve  café 猫 🐈‍⬛", "don't 123\n\t", "<b>", ""):
        assert again.encode(text) == ours.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    vocabulary = load(folder).vocabulary
    assert theirs("<bos><boi><|image:3|><eoi>")["input_ids"] == [
        vocabulary.bos, vocabulary.boi, vocabulary.image_start + 3, vocabulary.eoi
    ]  # fmt: skip
    # The stock folder has them too, and stops at the end of a turn.
    export_hf(folder, tmp_path / "stock")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert stock.chat_template == TEMPLATE
    config = json.loads((tmp_path / "stock/generation_config.json").read_text("utf-8"))
    assert config["eos_token_id"] == [vocabulary.eos, ours.vocabulary()["<|im_end|>"]]


@pytest.mark.parametrize("layout", ["gpt 2", "smollm 2", "qwen", "llama 3"])
def test_texts_have_the_ids_that_they_had(
    layout: str, sentences: tuple[str, ...], tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Read back from the file by ours and by transformers, in each way to split texts.

    Qwen's reads é in one letter and in two as the same, which GGUF does not describe.
    """
    images = load_image_tokenizer(tiny_model_folder / "image_tokenizer")
    made = made_as(layout, [*sentences, "In 2024 it's 10 or 250 degrees."] * 4)
    model = Model.new("tiny", TextTokenizer(made), images)
    model.save(tmp_path / "ours")
    export_gguf(tmp_path / "ours", tmp_path / "m.gguf")
    again = TextTokenizer.load(tmp_path / "m.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in hostile_strings(1000):
        ids = model.text_tokenizer.encode(text)
        assert again.encode(text) == ids, repr(text)
        normal = unicodedata.normalize("NFC", text) if layout == "qwen" else text
        found = theirs(normal, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert found == ids, repr(text)
        assert again.decode(ids) == model.text_tokenizer.decode(ids)


@pytest.mark.parametrize("spaced", [True, False])
def test_a_tokenizer_of_sentencepiece(
    spaced: bool, sentences: tuple[str, ...], tmp_path: Path
) -> None:
    """As llama.cpp's converter writes those of Llama 2, TinyLlama and Mistral."""
    made = made_as("llama 2", [*sentences, "  two  spaces"] * 4)
    stored, types = json.loads(made.to_str()), gguf.TokenType
    ids = made.get_vocab()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
    writer.add_token_scores([-float(number) for number in range(len(ids))])
    kinds = dict.fromkeys(ids, types.NORMAL) | dict.fromkeys(BYTES, types.BYTE)
    kinds |= dict.fromkeys(CONTROL, types.CONTROL) | {"<unk>": types.UNKNOWN}
    writer.add_token_types([kinds[token] for token in sorted(ids, key=lambda token: ids[token])])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
    if not spaced:
        writer.add_add_space_prefix(False)
        stored["normalizer"] = stored["normalizer"]["normalizers"][1]
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    ours = TextTokenizer.load(tmp_path / "m.gguf")
    expected = TextTokenizer.from_json(json.dumps(stored))
    assert ours.ends == ("</s>",) and ours.end_ids == [ids["</s>"]]
    for text in hostile_strings(1000):
        assert ours.encode(text) == expected.encode(text), repr(text)


@pytest.mark.parametrize("splits", ["tekken", None])
def test_splits_that_are_read_wrongly_or_not_named_are_refused(
    splits: str | None, sentences: tuple[str, ...], tmp_path: Path
) -> None:
    stored = json.loads(made_as("gpt 2", [*sentences]).to_str())
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    if splits is not None:
        writer.add_tokenizer_pre(splits)
    writer.add_token_list([*stored["model"]["vocab"]])
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    with pytest.raises(ValueError, match=f"as '{splits or 'default'}' does, .*; give the token"):
        TextTokenizer.load(tmp_path / "m.gguf")


def test_a_chat_has_the_tokens_of_its_language_model(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = load(tiny_model_folder)
    model.text_tokenizer.chat = ChatFormat("{{ bos_token }}a red bus{{ eos_token }}", "</s>", "<s>")
    model.save(tmp_path / "ours")
    export_gguf(tmp_path / "ours", tmp_path / "m.gguf")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"]
    template = jinja2.Template(field.contents())
    assert template.render(bos_token="<bos>", eos_token="<eos>") == "<s>a red bus</s>"


def test_rounded_weights_are_those_of_the_format(folder: Path, tmp_path: Path) -> None:
    weight = load(folder).network.transformer.layers[1].mlp.up_proj.weight.detach()
    for dtype, expected in (("float16", weight.half()), ("bfloat16", weight.bfloat16())):
        export_gguf(folder, tmp_path / f"{dtype}.gguf", dtype)
        stored = tensor_of(tmp_path / f"{dtype}.gguf", "blk.1.ffn_up.weight")
        assert torch.equal(stored, expected.float())
    export_gguf(folder, tmp_path / "q8.gguf", "q8_0")
    stored = tensor_of(tmp_path / "q8.gguf", "blk.1.ffn_up.weight")
    steps = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    assert (
        (stored - weight).unflatten(1, (-1, 32)).abs() <= 0.57 * steps
    ).all()  # the scale is rounded, too
    table = load(folder).network.transformer.embed_tokens.weight.detach()
    stored = tensor_of(tmp_path / "q8.gguf", "token_embd.weight")
    assert torch.equal(stored, table.half().float()), "the head decides between near words"
    norm = load(folder).network.transformer.norm.weight
    assert torch.equal(tensor_of(tmp_path / "q8.gguf", "output_norm.weight"), norm)


def test_four_bits_are_nearer_than_those_of_a_simpler_format() -> None:
    """Read by gguf's own code. There the rounding of the scales is the only error."""
    dice = np.random.default_rng(0)
    data = (dice.normal(size=(32, 512)) * dice.uniform(0.01, 1, (32, 1))).astype(np.float32)
    data[1], data[2], data[3], data[4] = 0, 0.5, -0.5, np.abs(data[4])
    types = gguf.GGMLQuantizationType

    def error(stored: Any, kind: Any, expected: Any = data) -> Any:
        difference = gguf.quants.dequantize(stored, kind) - expected
        return np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1).clip(1e-9)

    ours, theirs = quantize_q4_k(data), gguf.quants.quantize(data, types.Q4_0)
    assert ours.nbytes == data.size * 144 / 256 == theirs.nbytes
    assert (error(ours, types.Q4_K)[1:4] < 5e-3).all(), "all numbers of a row are equal"
    varied = error(ours, types.Q4_K)[4:]
    assert (varied < 0.09).all() and varied.mean() < 0.9 * error(theirs, types.Q4_0)[4:].mean()
    blocks = dice.integers(0, 256, (16, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([0.01, 0.004], np.float16).view(np.uint8)
    grid = gguf.quants.dequantize(blocks, types.Q4_K)
    assert (error(quantize_q4_k(grid), types.Q4_K, grid) < 0.02).all()


def test_a_file_of_four_bits_has_more_where_it_must(folder: Path, tmp_path: Path) -> None:
    """The widths of tiny models are no multiple of 256: then as llama.cpp does it."""
    export_gguf(folder, tmp_path / "q4.gguf", "q4_k")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q4.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_up.weight"] == "Q5_0"
    _, weights = read_stock(tmp_path / "q4.gguf")
    for name, weight in load(folder).network.transformer.stock_state_dict().items():
        assert (weights[name] - weight).norm() < 0.1 * weight.norm(), name


def test_a_wide_matrix_of_four_bits_is_read_back(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    stored, kind = _stored(data, "q4_k")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_tensor("a", stored, raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    read = tensor_of(tmp_path / "m.gguf", "a")
    assert read.shape == data.shape and kind.name == "Q4_K"
    assert (read - torch.from_numpy(data)).norm() < 0.1 * np.linalg.norm(data)


def test_the_command_writes_one_new_file(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "gguf", str(tiny_model_folder), str(tmp_path / "deep/m.gguf")]
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m.gguf"]
    before = (tmp_path / "deep/m.gguf").read_bytes()
    assert main(command) == 1
    assert "exists; name a new file" in capsys.readouterr().err
    assert (tmp_path / "deep/m.gguf").read_bytes() == before


def test_a_tokenizer_that_splits_otherwise_is_refused(tiny_model_folder: Path) -> None:
    stored = exported_tokenizer(load(tiny_model_folder))
    assert split_of(stored) == "gpt-2"
    byte_level = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}

    def name_of(*steps: dict[str, Any], **more: Any) -> str:
        sequence = {"type": "Sequence", "pretokenizers": [*steps]}
        return split_of({**stored, "pre_tokenizer": sequence, **more})

    for name, expression in SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
        assert name_of(split, byte_level) == name
        assert name_of(split, byte_level, normalizer={"type": "NFC"}) == name
    words, digits = {**byte_level, "use_regex": True}, {"type": "Digits", "individual_digits": True}
    assert name_of(digits, words) == "smollm"
    for other in (
        ({"type": "Metaspace"},),
        (words | {"add_prefix_space": True},),
        (digits | {"individual_digits": False}, words),
        (split | {"behavior": "MergedWithNext"}, byte_level),
        (split | {"invert": True}, byte_level),
        (split, words),
    ):
        with pytest.raises(ValueError, match="has no name for how this tokenizer splits"):
            name_of(*other)
    with pytest.raises(ValueError, match=r"does not normalize texts .* \(Lowercase\)"):
        name_of(words, normalizer={"type": "Lowercase"})
