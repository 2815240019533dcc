"""Runs that keep the words of a language model: text rows stay to the bit, and so does a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from multimodal.cli import main
from multimodal.model.stock import read_stock
from multimodal.scenes.dataset import write_scenes
from tests.launches import logged
from tests.model.test_transfer import images, qwen  # noqa: F401 (fixtures)

pytest.importorskip("peft")
WORDS = 302  # ids of texts


@pytest.mark.parametrize(
    ("qwen", "name", "more"),
    [
        (True, "distill.KeepWordsModule", {}),
        (
            False,
            "rewards.module.KeepWordsRewardModule",
            {"captions_written": 2, "max_tokens": 6, "lm_weight": 1.0},
        ),
    ],
    indirect=["qwen"],
    ids=["tied", "untied and rewarded"],
)
def test_a_run_keeps_the_rows_of_texts_and_resumes_to_the_bit(
    qwen: Path,  # noqa: F811
    images: str,  # noqa: F811
    name: str,
    more: dict[str, Any],
    tmp_path: Path,
    sentences: tuple[str, ...],
    one_thread: None,
) -> None:
    write_scenes(tmp_path / "scenes", 16, 0, 32)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in sentences)
    (tmp_path / "texts.jsonl").write_text(rows, "utf-8")
    texts = str(tmp_path / "texts")
    assert main(["data", "build", str(tmp_path / "texts.jsonl"), texts]) == 0
    module = {
        "text_tokenizer": str(qwen), "image_tokenizer": images, "size": str(qwen),
        "row_length": 192, "warmup_steps": 0, "captions_in_validation": 0,
        "drawings_in_validation": 0, "learning_rate": 0.01,
        "objectives": {"weights": {"text": 3.0}, "alignment_weight": 0.0},
        "lora": {"r": 2, "target": ["q_proj"], "new_rows": True},
    }  # fmt: skip
    config = {
        "checkpoint_every": 2,
        "model": {"class_path": f"multimodal.train.{name}", "init_args": module | more},
        "data": {"folders": [str(tmp_path / "scenes"), texts], "weights": [1, 1],
                 "global_batch_size": 4, "workers": 0},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 0, "log_every_n_steps": 1},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", str(tmp_path / "run.yaml"), "--output"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*fit, str(whole)]) == 0
    second = next(p for p in (whole / "checkpoints").iterdir() if "step=2." in p.name)
    assert main([*fit, str(again), "--ckpt_path", str(second)]) == 0
    assert len(logged(whole, "train/teacher/text")) == 4
    assert bool(logged(whole, "train/reward")) == bool(more)
    _, before = read_stock(qwen)
    after, resumed = (load_file(run / "model/model.safetensors") for run in (whole, again))
    tables = [name for name in after if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(tables) == (2 if more else 1)
    for table in tables:
        assert torch.equal(after[table][:WORDS], before[table][:WORDS]), table
    assert not torch.equal(after["model.layers.0.self_attn.q_proj.weight"],
                           before["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    for weight in after:
        assert torch.equal(resumed[weight], after[weight]), weight
