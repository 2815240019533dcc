"""The scripts of examples/ run, and do what they say."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from multimodal.api import load
from multimodal.export.gguf import export_gguf
from multimodal.export.hf import export_hf
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.scenes.dataset import write_scenes

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(script: str, *arguments: object) -> str:
    """What a script prints."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_the_joint_losses_in_a_plain_loop(work: Path, tiny_model_folder: Path) -> None:
    printed = run("plain_torch.py", tiny_model_folder, work / "scenes", 12)
    captions = losses(printed, "caption")
    assert len(captions) == 12 and sum(captions[-3:]) < sum(captions[:3])
    assert all(name in printed for name in ("alignment ", "total ", "answer "))


def test_the_module_in_a_trainer_of_ones_own(work: Path, tiny_model_folder: Path) -> None:
    run("plain_lightning.py", tiny_model_folder, work / "scenes", 2, work / "lightning")
    assert load(work / "lightning").config.transformer.num_hidden_layers == 2


def test_a_caption_by_transformers(work: Path, tiny_model_folder: Path) -> None:
    printed = run("transformers_caption.py", work / "exported", work / "photo.png")
    assert printed.endswith("\n") and "Traceback" not in printed


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
def test_lora_by_peft(work: Path) -> None:
    printed = run("peft_lora.py", work / "exported", work / "tuned", "a red bus", *range(16))
    learned = losses(printed, "loss")
    assert learned[-1] < 0.8 * learned[0]
    tuned = transformers.AutoModelForCausalLM.from_pretrained(work / "tuned")
    assert type(tuned).__name__ == "Qwen3ForCausalLM"


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_captions_by_llama_cpp(work: Path, tiny_model_folder: Path) -> None:
    export_gguf(tiny_model_folder, work / "m.gguf", "float32")
    printed = run("llama_cpp_caption.py", tiny_model_folder, work / "m.gguf", work / "photo.png")
    model = load(tiny_model_folder)
    assert encode_to_read(model, read_images(model, [work / "photo.png"])).shape[0] == 1
    assert printed.strip() == model.caption([work / "photo.png"])[0]


@pytest.mark.parametrize("script", ["vllm_caption.py", "sglang_caption.py"])
def test_the_others_are_python(script: str) -> None:
    compile((EXAMPLES / script).read_text("utf-8"), script, "exec")
