"""The scripts of examples/ run, and do what they say."""

import json
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from multimodal.api import load
from multimodal.cli import main
from multimodal.data.builder.build import build_shards
from multimodal.export.gguf import export_gguf
from multimodal.export.hf import export_hf
from multimodal.export.onnx import export_onnx
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.scenes.dataset import write_scenes

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(script, *arguments)``: what a script prints. It runs in this process."""

    def in_this_process(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        torch.manual_seed(0)
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return in_this_process


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_scenes(folder / "scenes", 24, 0, 32)
    export_hf(tiny_model_folder, folder / "exported")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def losses(printed: str, name: str) -> list[float]:
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    return [float(line.split(f"{name} ")[1].split(",")[0]) for line in lines]


def test_the_joint_losses_in_a_plain_loop(run: Run, work: Path, tiny_model_folder: Path) -> None:
    printed = run("plain_torch.py", tiny_model_folder, work / "scenes", 12)
    captions = losses(printed, "caption")
    assert len(captions) == 12 and sum(captions[-3:]) < sum(captions[:3])
    assert all(name in printed for name in ("alignment ", "total ", "answer "))


def test_the_module_in_a_trainer_of_ones_own(run: Run, work: Path, tiny_model_folder: Path) -> None:
    run("plain_lightning.py", tiny_model_folder, work / "scenes", 2, work / "lightning")
    assert load(work / "lightning").config.transformer.num_hidden_layers == 2


def test_a_caption_by_transformers(run: Run, work: Path, tiny_model_folder: Path) -> None:
    onnx = work / "onnx"
    export_onnx(tiny_model_folder, onnx)
    expected = load(tiny_model_folder).caption([work / "photo.png"])
    printed = run("transformers_caption.py", work / "exported", onnx, work / "photo.png")
    assert [printed.strip()] == expected
    script = (EXAMPLES / "transformers_caption.py").read_text("utf-8")
    assert "import multimodal" not in script and "from multimodal" not in script


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
def test_lora_by_peft(run: Run, work: Path) -> None:
    printed = run("peft_lora.py", work / "exported", work / "tuned", "a red bus", *range(16))
    learned = losses(printed, "loss")
    assert learned[-1] < 0.8 * learned[0]
    tuned = transformers.AutoModelForCausalLM.from_pretrained(work / "tuned")
    assert type(tuned).__name__ == "Qwen3ForCausalLM"
    assert main(["import", str(work / "tuned"), str(work / "ours")]) == 0
    weights = load(work / "ours").network.transformer.stock_state_dict()
    assert torch.equal(weights["model.norm.weight"], tuned.model.norm.weight)
    queries, values = (weights[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qv")
    assert torch.equal(queries, tuned.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(values, tuned.model.layers[0].self_attn.v_proj.weight)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_captions_by_llama_cpp(run: Run, work: Path, tiny_model_folder: Path) -> None:
    export_gguf(tiny_model_folder, work / "m.gguf", "float32")
    printed = run("llama_cpp_caption.py", tiny_model_folder, work / "m.gguf", work / "photo.png")
    model = load(tiny_model_folder)
    assert encode_to_read(model, read_images(model, [work / "photo.png"])).shape[0] == 1
    expected = model.caption([work / "photo.png"])[0]
    # This model writes bytes that are no UTF-8. llama-cpp-python leaves them out.
    assert printed.strip() == expected.replace("\N{REPLACEMENT CHARACTER}", "")


def test_a_language_model_writes_texts(run: Run, tmp_path: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    specials, letters = ["<|endoftext|>", "<|turn|>"], pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["A dog. A cat!"],
        trainers.BpeTrainer(special_tokens=specials, initial_alphabet=letters, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=specials[1], pad_token=specials[0]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert "130 of 130 texts" in run("own_texts.py", tmp_path / "llama", tmp_path / "t.jsonl", 130)
    texts = [json.loads(line)["text"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(texts) > 50
    assert not any(word in text for text in texts for word in ("<|", "user"))
    report = build_shards(tmp_path / "t.jsonl", tmp_path / "texts")
    assert report is not None and report.kept == len(texts)


@pytest.mark.parametrize("script", ["vllm_caption.py", "sglang_caption.py"])
def test_the_others_are_python(script: str) -> None:
    compile((EXAMPLES / script).read_text("utf-8"), script, "exec")
