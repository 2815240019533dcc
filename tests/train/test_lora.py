"""A run with LoRA: only the adapter trains, resumes to the bit, and is what peft says it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from multimodal.api import load
from multimodal.cli import main
from multimodal.export.hf import export_hf
from multimodal.scenes.dataset import write_scenes


def configuration(base: Path, folder: Path, **module: Any) -> dict[str, Any]:
    arguments = {
        "text_tokenizer": str(base), "image_tokenizer": str(base), "size": "tiny",
        "objectives": {"alignment_dim": 32}, "row_length": 192, "warmup_steps": 0,
        "learning_rate": 0.02,
        "captions_in_validation": 0, "answers_in_validation": 0, "drawings_in_validation": 0,
    }  # fmt: skip
    return {
        "checkpoint_every": 1,
        "model": {
            "class_path": "multimodal.train.joint.JointModule",
            "init_args": arguments | module,
        },
        "data": {"folders": [str(folder / "scenes")], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 1, "log_every_n_steps": 1},
    }  # fmt: skip


@pytest.fixture(scope="session")
def adapted(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, scenes/ and a run with LoRA on the tiny model: whole/. Tests only read it."""
    folder, threads = tmp_path_factory.mktemp("lora"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_scenes(folder / "scenes", 24, 0, 32)
    config = configuration(tiny_model_folder, folder, lora={"r": 4, "dropout": 0.1})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(folder / "run.yaml"), "--init_from", str(tiny_model_folder)]
    assert main([*run, "--output", str(folder / "whole")]) == 0
    torch.set_num_threads(threads)
    return folder


def test_an_adapter_says_in_peft_what_it_says_here(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export_hf(tiny_model_folder, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    theirs = peft.PeftModel.from_pretrained(stock, adapted / "whole/adapter").eval()
    base, ours = load(tiny_model_folder), load(tiny_model_folder, adapter=adapted / "whole/adapter")
    ids = torch.randint(0, 300, (2, 24))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found, before = (logits(model, ids) for model in (ours, base))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.1  # it has learned something


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    transformer, length = model.network.transformer, ids.shape[1]
    positions = torch.arange(length).expand(len(ids), -1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return transformer.logits(transformer(ids, positions, mask))
