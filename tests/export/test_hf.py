"""An exported folder is a stock Qwen3 with the same logits, ids and greedy texts."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.export.hf import export_hf
from multimodal.inference.codec import encode_images, read_images
from multimodal.inference.text import generate_ids
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.transformer import Transformer, TransformerConfig
from multimodal.model.sequences import (
    TokenSequence,
    describe,
    describe_prompt,
    document,
    draw,
    pack,
)
from multimodal.model.vocabulary import SPECIALS
from multimodal.options import TextOptions
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.text import ChatFormat, TextTokenizer
from tests.tokenizers.test_levels import detail, meaning

transformers = pytest.importorskip("transformers")

CODES = [5, 0, 63, 17, 17, 40, 2, 9, 33, 60, 1, 8, 8, 20, 31, 62]
TEXTS = (
    "a red bus", " leading space", "trailing ", "two  spaces", "naïve café 猫 🐈", "don't 123,456",
    "line\nbreak\t tab", "<b>", "<| image:3 |>", "",
)  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Model, Any, Any]:
    """Ours, and the exported model and tokenizer as transformers loads them."""
    folder = tmp_path_factory.mktemp("export")
    ours = tiny_model(noise=0.1, tied=request.param)
    ours.save(folder / "ours")
    export_hf(folder / "ours", folder / "stock")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "stock", local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "stock", local_files_only=True)
    return ours, theirs.eval(), tokenizer


@torch.inference_mode()
def our_logits(transformer: Transformer, ids: Tensor) -> Tensor:
    """ids: int64[B, L], causal -> float32[B, L, V]"""
    documents = torch.ones_like(ids)
    mask = attention_mask(documents, torch.zeros_like(ids))
    return transformer.logits(transformer(ids, documents.cumsum(1) - 1, mask))


def causal_sequences(model: Model) -> dict[str, TokenSequence]:
    vocabulary, text = model.vocabulary, model.text_tokenizer.encode("two dogs run")
    return {
        "describe": describe(vocabulary, CODES, [text]),
        "draw": draw(vocabulary, text, CODES),
        "unconditional draw": draw(vocabulary, None, CODES),
        "text": document(vocabulary, [text])[0],
    }


def test_transformers_loads_it_as_stock_qwen3(pair: tuple[Model, Any, Any]) -> None:
    ours, theirs, tokenizer = pair
    assert type(theirs) is transformers.Qwen3ForCausalLM
    vocabulary, config = ours.vocabulary, theirs.generation_config
    assert theirs.config.vocab_size == vocabulary.size
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        vocabulary.bos, vocabulary.eos, vocabulary.pad
    )  # fmt: skip
    assert not config.do_sample
    assert config.suppress_tokens == list(range(vocabulary.image_end, vocabulary.size))
    assert theirs.dtype == torch.float32
    assert theirs.config.rope_parameters["rope_theta"] == ours.config.transformer.rope_theta


def test_logits_are_equal(pair: tuple[Model, Any, Any]) -> None:
    ours, theirs, _ = pair
    for name, sequence in causal_sequences(ours).items():
        ids = torch.from_numpy(sequence.ids)[None]
        with torch.inference_mode():
            expected = theirs(ids).logits
        assert expected.std() > 0.5, "logits that differ enough to compare"
        error = float((our_logits(ours.network.transformer, ids) - expected).abs().max())
        assert error < 1e-4, f"{name}: {error}"


def test_packed_rows_give_the_logits_of_the_export(pair: tuple[Model, Any, Any]) -> None:
    """Several documents in a row, as in training, have the logits that an engine computes alone."""
    ours, theirs, _ = pair
    sequences = list(causal_sequences(ours).values())
    packed = pack(sequences, 128, ours.vocabulary.pad)
    with torch.inference_mode():
        logits = ours.network.transformer.logits(ours.network.hidden(packed)).flatten(0, 1)
        for sequence, state in zip(sequences, packed.states.tolist(), strict=True):
            start = state - sequence.state
            expected = theirs(torch.from_numpy(sequence.ids)[None]).logits[0]
            assert (logits[start : start + len(sequence)] - expected).abs().max() < 1e-4


def test_the_tokenizer_gives_our_ids(pair: tuple[Model, Any, Any]) -> None:
    ours, _, tokenizer = pair
    vocabulary, encode = ours.vocabulary, ours.text_tokenizer.encode
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == encode(text), text
        assert tokenizer.decode(encode(text)) == text
    prompt = "<bos><boi>" + "".join(f"<|image:{code}|>" for code in CODES) + "<eoi>"
    assert tokenizer(prompt)["input_ids"] == describe_prompt(vocabulary, CODES)
    mixed = "<bos> a red <null><|image:3|>bus <|image:64|><mask><pad><eos>"
    assert tokenizer(mixed)["input_ids"] == [
        vocabulary.bos, *encode(" a red "), vocabulary.null, vocabulary.image_start + 3,
        *encode("bus <|image:64|>"), vocabulary.mask, vocabulary.pad, vocabulary.eos,
    ]  # fmt: skip
    for text in (prompt, mixed):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    plain = tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True)
    assert plain == "".join(f"<|image:{code}|>" for code in CODES)
    assert tokenizer("<eos>", split_special_tokens=True)["input_ids"] == encode("<eos>")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<bos>", "<eos>", "<pad>"
    )  # fmt: skip
    assert len(tokenizer) == vocabulary.image_end


def test_greedy_text_is_the_same(pair: tuple[Model, Any, Any]) -> None:
    """Prompts of different lengths in one batch, theirs with left padding too."""
    ours, theirs, tokenizer = pair
    prompts = [
        "<bos><boi>" + "".join(f"<|image:{code}|>" for code in CODES) + "<eoi>",
        "<bos>a red",
        "<bos><boi>" + "".join(f"<|image:{code}|>" for code in CODES[::-1]) + "<eoi>two",
    ]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    vocabulary = ours.vocabulary
    allowed = {*range(vocabulary.text_size), vocabulary.eos}
    grammar = [i for i in range(vocabulary.size) if i not in allowed]
    output = theirs.generate(**inputs, max_new_tokens=24, suppress_tokens=grammar)
    texts = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        texts.append(row[: row.index(vocabulary.eos)] if vocabulary.eos in row else row)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert generate_ids(ours, ids, TextOptions(max_tokens=24)) == texts
    assert len({tuple(text) for text in texts}) == 3


def test_a_prompt_begins_as_it_is_written(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The tokenizers of many language models put a token before each text."""
    model = load(tiny_model_folder)
    tokenizer = Tokenizer.from_str(model.text_tokenizer.to_json())
    tokenizer.post_processor = TemplateProcessing("! $A", special_tokens=[("!", 0)])
    assert tokenizer.encode("a").tokens == ["!", "a"]
    model.text_tokenizer = TextTokenizer.from_json(tokenizer.to_str())
    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "stock", local_files_only=True)
    expected = [model.vocabulary.bos, *model.text_tokenizer.encode("a red bus")]
    assert theirs("<bos>a red bus")["input_ids"] == expected


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_a_chat_has_the_tokens_of_its_language_model(
    begin: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = load(tiny_model_folder)
    turns = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    model.text_tokenizer.chat = ChatFormat("{{ bos_token }}" + turns, "<｜end▁of▁turn｜>", begin)
    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "stock", local_files_only=True)
    messages = [{"role": "user", "content": "a red bus"}]
    shown = theirs.apply_chat_template(messages, tokenize=False)
    assert shown == f"{begin}a red bus<｜end▁of▁turn｜>"


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen3_checkpoint_loads_into_ours(tied: bool) -> None:
    sizes: dict[str, Any] = dict(
        vocab_size=256, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, intermediate_size=96, tie_word_embeddings=tied,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    theta = 1e6
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **sizes, rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.1 * torch.randn_like(weight)
    ours = Transformer(TransformerConfig(**sizes, rope_theta=theta))
    ours.load_stock_state_dict(theirs.state_dict())
    ids = torch.randint(256, (2, 40))
    with torch.inference_mode():
        expected = theirs(ids).logits
    assert expected.std() > 0.5
    assert (our_logits(ours, ids) - expected).abs().max() < 1e-4
    back = ours.stock_state_dict()
    missing = {} if not tied else {"lm_head.weight"}
    assert back.keys() == theirs.state_dict().keys() - missing
    assert all(torch.equal(back[name], theirs.state_dict()[name]) for name in back)


def test_an_untied_checkpoint_does_not_load_as_a_tied_one() -> None:
    sizes = (256, 32, 1, 2, 2, 16, 64)
    untied = Transformer(TransformerConfig(*sizes, tie_word_embeddings=False))
    with pytest.raises(RuntimeError, match="lm_head"):
        Transformer(TransformerConfig(*sizes)).load_stock_state_dict(untied.stock_state_dict())


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_all_or_nothing(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["export", "hf", str(tiny_model_folder), str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(str(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "image_tokenizer", "model.safetensors",
        "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert theirs.dtype == torch.bfloat16
    ours = load(tiny_model_folder)
    weight = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(weight, ours.network.transformer.layers[1].mlp.up_proj.weight.bfloat16())

    before = (out / "config.json").read_bytes()
    assert main(["export", "hf", str(tiny_model_folder), str(out)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before


def test_the_ids_of_added_tokens_are_in_the_file(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The tokenizers library numbers added tokens itself. Converters read the ids in the file."""
    export_hf(tiny_model_folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    vocabulary = load(tiny_model_folder).vocabulary
    specials = {token["content"]: token["id"] for token in written if token["special"]}
    assert specials == {name: vocabulary.special(name) for name in SPECIALS}
    codes = {token["content"]: token["id"] for token in written if not token["special"]}
    assert codes == {f"<|image:{i}|>": vocabulary.image_start + i for i in range(64)}


def test_an_empty_folder_may_be_filled(tiny_model_folder: Path, tmp_path: Path) -> None:
    export_hf(tiny_model_folder, tmp_path / "a")
    (tmp_path / "b").mkdir()
    export_hf(tiny_model_folder, tmp_path / "b")
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failure_leaves_nothing_behind(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="no such model folder"):
        export_hf(tmp_path / "nothing", tmp_path / "out")
    monkeypatch.setattr("multimodal.export.hf.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        export_hf(tiny_model_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export_hf(tiny_model_folder, tmp_path / "file")


def test_the_readme_runs(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both of its examples, with another image than the cat."""
    import numpy as np
    from PIL import Image

    export_hf(tiny_model_folder, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    captioning, coding = (part.split("```")[0] for part in readme.split("```python\n")[1:])
    coding = coding.replace("cat.jpg", str(tmp_path / "cat.png"))
    coding = coding.replace("as-the-model", f"{tmp_path}/as-the-model")
    names: dict[str, Any] = {}
    captioning = captioning.replace('"."', repr(str(tmp_path / "out")))
    exec(captioning.split("codes = ")[0], names)
    exec(coding, names)
    assert (tmp_path / "as-the-model-sees-it.png").is_file()
    exec("prompt = " + captioning.split("prompt = ")[1], names)
    ours = load(tiny_model_folder)
    codes = encode_images(ours, read_images(ours, [tmp_path / "cat.png"]))
    prompt = describe_prompt(ours.vocabulary, codes[0].tolist())
    assert names["inputs"]["input_ids"].tolist() == [prompt]
    assert capsys.readouterr().out.strip()


def test_a_rounded_model_is_half_the_size_and_verified(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    assert main(["export", "model", str(tiny_model_folder), str(out)]) == 0
    before, after = load(tiny_model_folder), load(out)
    sizes = [(f / "model.safetensors").stat().st_size for f in (tiny_model_folder, out)]
    assert sizes[1] < 0.55 * sizes[0]
    stored = json.loads((out / "config.json").read_text())["fingerprints"]
    assert after.fingerprint == stored["model"] != before.fingerprint
    assert after.image_tokenizer.fingerprint == before.image_tokenizer.fingerprint
    after_weights = after.network.transformer.state_dict()
    for name, weight in before.network.transformer.state_dict().items():
        assert torch.equal(after_weights[name], weight.bfloat16().float())


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.parametrize("form", ["hf", "model"])
def test_others_may_read_what_is_written(
    tiny_model_folder: Path, tmp_path: Path, form: str
) -> None:
    before = os.umask(0o027)
    try:
        assert main(["export", form, str(tiny_model_folder), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 3 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_only_an_image_tokenizer_with_the_same_codes_replaces_another(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_model_folder)
    export = ["export", "model", str(tiny_model_folder), str(tmp_path / "out"), "--dtype"]
    export += ["float32", "--image-tokenizer", str(tmp_path / "other")]
    weights = dict(model.image_tokenizer.named_parameters())
    stem = weights["detail.encoder.stem.0.weight"].clone()
    with torch.no_grad():
        weights["detail.encoder.stem.0.weight"] *= 1.5
    model.image_tokenizer.save(tmp_path / "other")
    assert main(export) == 1
    assert "makes other codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        weights["detail.encoder.stem.0.weight"].copy_(stem)
        weights["detail.decoder.from_vectors.weight"] *= 1.5
    model.image_tokenizer.save(tmp_path / "other")
    assert main(export) == 0
    old, new = load(tiny_model_folder), load(tmp_path / "out")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = old.image_tokenizer.encode(images)
    assert torch.equal(codes, new.image_tokenizer.encode(images))
    assert not torch.equal(old.image_tokenizer.decode(codes), new.image_tokenizer.decode(codes))


def test_an_image_tokenizer_that_does_not_fit_the_model_is_refused(
    tiny_model: Callable[..., Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its decoder reads a level that the model does not draw. The codes are the same."""
    seen = meaning()
    before, other = (ImageTokenizer(seen, detail(reads=reads)) for reads in (None, seen))
    assert other.codes_fingerprint == before.codes_fingerprint
    text_tokenizer = tiny_model().text_tokenizer
    Model.new("tiny", text_tokenizer, before, draws=["detail"]).save(tmp_path / "model")
    other.save(tmp_path / "other")
    export = ["export", "model", str(tmp_path / "model"), str(tmp_path / "out")]
    export += ["--dtype", "float32", "--image-tokenizer", str(tmp_path / "other")]
    assert main(export) == 1
    assert "the decoder of detail reads meaning" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
