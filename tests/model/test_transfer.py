"""Start from a Qwen3, freeze parts, and give parts other learning rates."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.export.hf import export_hf
from multimodal.model.network import MultimodalLM
from multimodal.model.stock import read_stock
from multimodal.scenes.dataset import write_scenes
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from tests.launches import logged
from tests.photos import picture

TEXT = "two dogs run <think> on the <|im_end|> beach"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def qwen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    sentences: tuple[str, ...],
) -> Path:  # fmt: skip
    """A folder as Hugging Face writes it: weights in two files, more rows than tokens, a control
    token in its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    TextTokenizer.train(sentences * 4, 300).save(folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["<think>"])  # Qwen's is not marked as special
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=512,
        tie_word_embeddings=request.param, rope_theta=1e6, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def images(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder / "image_tokenizer")


def test_a_qwen3_keeps_its_words_and_the_new_rows_start_at_their_mean(
    qwen: Path, images: str, tmp_path: Path
) -> None:
    text = TextTokenizer.load(qwen)
    model = Model.new(str(qwen), text, load_image_tokenizer(images)).eval()
    transformer = model.network.transformer
    assert len(text) == 302 and text.decode(text.encode(TEXT)) == TEXT
    for tokenizer in (text, copy.deepcopy(text), TextTokenizer.from_json(text.to_json())):
        assert max(tokenizer.encode(TEXT)) < 300, "what a user types is no control token"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(qwen).eval()
    ids = torch.tensor([text.encode(TEXT)])
    positions = torch.arange(ids.shape[1])[None]
    causal = torch.ones(1, 1, *(ids.shape[1],) * 2).bool().tril()
    with torch.no_grad():
        ours = transformer.logits(transformer(ids, positions, causal))
        expected = theirs(ids).logits
    torch.testing.assert_close(ours[..., :302], expected[..., :302], atol=1e-5, rtol=1e-5)
    table = transformer.lm_head.weight
    mean = theirs.lm_head.weight[:302].mean(0)
    torch.testing.assert_close(table[model.vocabulary.boi], mean)
    codes = table[model.vocabulary.image_start : model.vocabulary.image_end]
    torch.testing.assert_close(codes.mean(0), mean, atol=0.03, rtol=0)
    assert len(codes.unique(dim=0)) == len(codes), "codes can be told apart"

    model.save(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "stock")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert again("<bos>a red <|image:3|>")["input_ids"] == [
        model.vocabulary.bos, *text.encode("a red "), model.vocabulary.image_start + 3
    ]  # fmt: skip


def test_frozen_parts_stay_and_others_have_their_rate(
    qwen: Path, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 24, 0, 32)
    module = {
        "text_tokenizer": str(qwen), "image_tokenizer": images, "size": str(qwen),
        "row_length": 192, "warmup_steps": 0, "captions_in_validation": 0,
        "drawings_in_validation": 0, "recompute": True,
        "freeze": ["network.transformer.layers.0", "*.q_norm.*"],
        "learning_rates": {"network.transformer.layers.1.mlp": 0.0},
    }  # fmt: skip
    config = {
        "model": {"class_path": "multimodal.train.joint.JointModule", "init_args": module},
        "data": {"folders": [str(tmp_path / "scenes")], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 0},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run")]
    assert main(run) == 0
    _, before = read_stock(qwen)
    after = load_file(tmp_path / "run/model/model.safetensors")
    for name, value in after.items():
        frozen = "layers.0." in name or "q_norm" in name or "layers.1.mlp" in name
        if value.shape == before[name].shape:
            assert torch.equal(value, before[name]) == frozen, name
    assert load(tmp_path / "run/model").config.transformer.rope_theta == 1e6
    run[-1] = str(tmp_path / "another")
    assert main([*run, "--model.freeze", "[network.nowhere]"]) == 1
    assert "'network.nowhere': no part of that name; there is " in capsys.readouterr().err
    assert main([*run, "--model.freeze", "['*']"]) == 1
    assert "nothing is left to train" in capsys.readouterr().err


def test_with_an_adapter_and_new_rows_the_text_rows_stay(
    qwen: Path, images: str, tmp_path: Path, one_thread: None
) -> None:
    pytest.importorskip("peft")
    write_scenes(tmp_path / "scenes", 24, 0, 32)
    module = {
        "text_tokenizer": str(qwen), "image_tokenizer": images, "size": str(qwen),
        "row_length": 192, "warmup_steps": 0, "captions_in_validation": 0,
        "drawings_in_validation": 0, "learning_rate": 0.02,
        "lora": {"r": 4, "target": ["q_proj", "layers.0.mlp.down_proj"], "new_rows": True},
    }  # fmt: skip
    config = {
        "model": {"class_path": "multimodal.train.joint.JointModule", "init_args": module},
        "data": {"folders": [str(tmp_path / "scenes")], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 0},
        "checkpoint_every": 2,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(tmp_path / "run.yaml"), "--output"]
    assert main([*run, str(tmp_path / "run")]) == 0
    _, before = read_stock(qwen)
    after = load_file(tmp_path / "run/model/model.safetensors")
    for name, value in after.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(value[:302], before[name][:302]), name
        elif name in before:
            adapted = "q_proj" in name or "layers.0.mlp.down_proj" in name
            assert torch.equal(value, before[name]) != adapted, name
            if adapted:
                assert torch.linalg.matrix_rank(value - before[name], rtol=1e-4) == 4, name
    start = Model.new(str(qwen), TextTokenizer.load(qwen), load_image_tokenizer(images))
    model = load(tmp_path / "run/model")
    changed = model.network.transformer.embed_tokens.weight[302:]
    same = changed == start.network.transformer.embed_tokens.weight[302:]
    assert not same[model.vocabulary.boi - 302].all()
    # What is written computes what the checkpoint does, and a resumed run writes the same bytes.
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert main(["export", "model", str(last), str(tmp_path / "exported")]) == 0
    second = next(path for path in last.parent.iterdir() if "step=2." in path.name)
    assert main([*run, str(tmp_path / "again"), "--ckpt_path", str(second)]) == 0
    for folder in ("exported", "again/model"):
        again = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(again[name], value) for name, value in after.items()), folder


def test_a_language_model_that_learns_to_see_keeps_its_words(
    qwen: Path,
    images: str,
    tmp_path: Path,
    sentences: tuple[str, ...],
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside scenes it reads texts: it learns them, or is held to what it said of texts before."""
    pytest.importorskip("peft")
    write_scenes(tmp_path / "scenes", 24, 0, 32)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in sentences[1::2])
    (tmp_path / "texts.jsonl").write_text(rows, "utf-8")
    texts = str(tmp_path / "texts")
    assert main(["data", "build", str(tmp_path / "texts.jsonl"), texts]) == 0
    before = Model.new(str(qwen), TextTokenizer.load(qwen), load_image_tokenizer(images))
    module = {
        "text_tokenizer": str(qwen), "image_tokenizer": images, "size": str(qwen),
        "row_length": 192, "warmup_steps": 0, "captions_in_validation": 0,
        "drawings_in_validation": 0, "learning_rate": 0.005,
        "objectives": {"weights": {"text": 3.0}, "alignment_weight": 0.0},
        "lora": {"r": 4, "target": ["q_proj", "v_proj"], "new_rows": True},
    }  # fmt: skip
    dropping, compute = set[bool](), MultimodalLM.hidden

    def hidden(self: MultimodalLM, *arguments: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            dropping.add(self.training)
        return compute(self, *arguments)

    monkeypatch.setattr(MultimodalLM, "hidden", hidden)
    moved = {}
    for name in ("joint.JointModule", "distill.KeepWordsModule"):
        config = {
            "model": {"class_path": f"multimodal.train.{name}", "init_args": module},
            "data": {"folders": [str(tmp_path / "scenes"), texts], "weights": [1, 1],
                     "global_batch_size": 8, "workers": 0},
            "trainer": {"max_steps": 20, "accelerator": "cpu", "enable_progress_bar": False,
                        "limit_val_batches": 0, "log_every_n_steps": 1},
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        output = tmp_path / name
        assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--output", str(output)]) == 0
        assert dropping == ({False} if "Keep" in name else set()), "what it said is no noise"
        after = load(output / "model")
        divergences = []
        for text in sentences[::2]:
            ids = torch.tensor([after.text_tokenizer.encode(text)])
            places = torch.arange(ids.shape[1])[None]
            mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
            q, p = (
                m.network.transformer.logits(m.network.transformer(ids, places, mask))[0]
                for m in (after, before)
            )
            p = p[:, : after.vocabulary.text_size].log_softmax(-1)
            q = q.log_softmax(-1)[:, : p.shape[1]]
            divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
        moved[name] = sum(divergences) / len(divergences)
        if "Keep" in name:
            assert len(logged(output, "train/teacher/text")) == 20
            assert not logged(output, "train/teacher/caption")
    assert moved["distill.KeepWordsModule"] < 0.4 * moved["joint.JointModule"], moved


def test_the_recipe_that_learns_to_see_runs(
    qwen: Path, images: str, tmp_path: Path, sentences: tuple[str, ...]
) -> None:
    """``smollm2_photos.yaml`` as it is, but small, for data as its comment names them."""
    pytest.importorskip("peft")
    (tmp_path / "photos").mkdir()
    for number in range(24):
        (tmp_path / f"photos/{number}.png").write_bytes(picture(number, size=(32, 32)))
        caption = sentences[number % len(sentences)]
        (tmp_path / f"photos/{number}.txt").write_text(caption, "utf-8")
    shards, codes = str(tmp_path / "shards"), str(tmp_path / "codes")
    assert main(["data", "build", str(tmp_path / "photos"), shards, "--val-share", "0.2"]) == 0
    assert main(["tokenizer", "encode", shards, codes, "--tokenizer", images]) == 0
    rows = "".join(json.dumps({"text": text}) + "\n" for text in sentences)
    (tmp_path / "texts.jsonl").write_text(rows, "utf-8")
    texts = str(tmp_path / "texts")
    assert main(["data", "build", str(tmp_path / "texts.jsonl"), texts]) == 0
    model = {"text_tokenizer": qwen, "size": qwen, "image_tokenizer": images, "reads": "null"}
    options = {f"--model.init_args.{name}": str(value) for name, value in model.items()} | {
        "--data.folders": f"[{codes}, {texts}]", "--data.global_batch_size": "8",
        "--trainer.max_steps": "2", "--trainer.val_check_interval": "2",
        "--trainer.accelerator": "cpu", "--trainer.precision": "32-true",
        "--trainer.enable_progress_bar": "false",
    }  # fmt: skip
    options["--output"] = str(tmp_path / "run")
    words = [word for option in options.items() for word in option]
    assert main(["fit", "--config", "smollm2_photos.yaml", *words]) == 0
    _, before = read_stock(qwen)
    after = load_file(tmp_path / "run/model/model.safetensors")
    table = next(name for name in after if name.endswith("embed_tokens.weight"))
    assert torch.equal(after[table][:302], before[table][:302])
    assert isinstance(load(tmp_path / "run/model").caption(tmp_path / "photos/0.png"), str)
    # A run that goes on from it leaves what was learned: at a rate of almost 0 nothing changes.
    options |= {"--output": str(tmp_path / "on"), "--init_from": str(tmp_path / "run/model")}
    options |= {"--model.init_args.learning_rate": "1e-12", "--trainer.max_steps": "1"}
    options["--trainer.val_check_interval"] = "1"
    words = [word for option in options.items() for word in option]
    assert main(["fit", "--config", "smollm2_photos.yaml", *words]) == 0
    on = load_file(tmp_path / "on/model/model.safetensors")
    assert torch.allclose(on[table], after[table], atol=1e-6)
    # And the recipe after it rewards captions. Texts stay to the bit again.
    options |= {"--output": str(tmp_path / "rewarded"), "--model.init_args.learning_rate": "1e-3"}
    words = [word for option in options.items() for word in option]
    assert main(["fit", "--config", "smollm2_reward.yaml", *words]) == 0
    rewarded = load_file(tmp_path / "rewarded/model/model.safetensors")
    assert torch.equal(rewarded[table][:302], before[table][:302])
    assert not torch.equal(rewarded[table][302:], after[table][302:])
