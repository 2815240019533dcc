"""Trainings for benchmarks: by ``multimodal fit``, resumed if stopped, or in memory."""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from multimodal.api import Model
from multimodal.data.images import to_image
from multimodal.data.shards import Shards
from multimodal.eval.evaluate import git_commit
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.metrics.proportions import Cases
from multimodal.eval.metrics.scene_drawings import complete_caption, judge_scene_drawings
from multimodal.eval.tasks.scene_captions import SceneCaptions
from multimodal.files import write_json
from multimodal.inference.codec import decode_images
from multimodal.inference.drawing import draw_codes
from multimodal.model.network import MultimodalLM
from multimodal.model.training_batch import TrainingBatch
from multimodal.options import DrawOptions, Method
from multimodal.seeds import stable_number
from multimodal.train.optim import muon, warmup_cosine

TRAINER = {
    "precision": "bf16-mixed",
    "gradient_clip_val": 1.0,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 20,
    "enable_progress_bar": False,
}


def fit(
    folder: Path,
    module: str,
    arguments: dict[str, Any],
    data: dict[str, Any],
    steps: int,
    seed: int = 0,
    start: str | None = None,
) -> None:
    """Start a run, resume one that was stopped, or do nothing if it is done.

    The model is in ``folder/model``. ``folder/seconds`` has the seconds of the last start.

    Args:
        start: the model that a new run starts from.

    Raises:
        SystemExit: for a folder that holds a run of another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "output": str(folder),
        "seed_everything": seed,
        **({} if start is None else {"init_from": start}),
        "model": {"class_path": f"multimodal.train.{module}", "init_args": arguments},
        "data": {"workers": 1, **data},
        "trainer": {**TRAINER, "max_steps": steps, "val_check_interval": steps},
    }
    written, text = folder / "config.yaml", yaml.safe_dump(config)
    if written.is_file() and yaml.safe_load(written.read_text("utf-8")) != yaml.safe_load(text):
        sys.exit(f"{folder}: holds a run of another configuration; give another --out")
    written.write_text(text, "utf-8")
    if (folder / "seconds").is_file():
        return
    command = [sys.executable, "-m", "multimodal.cli", "fit", "--config", folder / "config.yaml"]
    if (last := folder / "checkpoints/last.ckpt").is_file():
        command += ["--ckpt_path", last, "--init_from", "null"]  # the checkpoint has all weights
    began = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True)
    (folder / "seconds").write_text(f"{time.perf_counter() - began:.0f}\n", "utf-8")


def fit_in_memory(
    network: MultimodalLM,
    build: Callable[[Sequence[int], int], TrainingBatch],
    count: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    name: str,
) -> int:
    """Train a network as ``multimodal fit`` does in bf16, without files.

    Args:
        network: is left in eval mode.
        build: the batch of some samples, by their numbers, in an epoch.
        count: how many samples there are. Their order is the same in each call.
        name: shown beside the progress.

    Returns:
        The number of tokens that were read.
    """
    optimizer = muon(network, [], learning_rate, weight_decay=0.1)
    schedule = warmup_cosine(optimizer, min(100, steps // 10), steps)
    parameters = [p for p in network.parameters() if p.requires_grad]
    tokens = 0
    network.train()
    for step in tqdm(range(steps), name, disable=None):
        epoch, place = divmod(step, count // batch_size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        batch = build(order.split(batch_size)[place].tolist(), epoch)
        with torch.autocast(network.device.type, torch.bfloat16):
            loss, _ = network(batch.to(network.device))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tokens += batch.tokens
    network.eval()
    return tokens


def last_figures(folder: Path) -> dict[str, float]:
    """The last value of each name in the log."""
    figures: dict[str, float] = {}
    with open(folder / "logs/metrics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            figures |= {name: float(value) for name, value in row.items() if name and value}
    return figures


def score_captions(model: Model, data: str) -> dict[str, float]:
    """Claims in captions of 200 scenes of val, greedy."""
    samples = list(islice(Shards(data, "val"), 200))
    scores = evaluate(SceneCaptions(), Subject(model, samples))
    return {name: score["value"] for name, score in scores.items()}


def judge_drawings(model: Model, data: str, options: DrawOptions) -> dict[str, Cases]:
    """What is right in drawings of 200 scenes of val, as ``judge_scene_drawings`` says it."""
    records = (sample.record for sample in islice(Shards(data, "val"), 200))
    prompts = [caption for record in records if (caption := complete_caption(record))]
    codes = [
        draw_codes(
            model,
            prompts[start : start + 64],
            options,
            numbers=range(start, min(start + 64, len(prompts))),
        )
        for start in range(0, len(prompts), 64)
    ]
    drawn = [to_image(image) for image in decode_images(model, torch.cat(codes))]
    return judge_scene_drawings(prompts, drawn)


def score_drawings(model: Model, data: str, method: Method = "causal") -> dict[str, float]:
    """Scores of these drawings: guidance 3, the default temperature, seed 0. ``n``: objects."""
    judged = judge_drawings(model, data, DrawOptions(method=method))
    scores = {name: cases.mean for name, cases in judged.items()}
    return scores | {"n": float(len(judged["objects"].values))}


def file_of(folder: Path, name: str, settings: dict[str, Any], suffix: str) -> Path:
    """The file of a result. Other settings have another file."""
    digest = stable_number(json.dumps(settings))
    return folder / f"{name.replace('/', '_')}-{digest:016x}.{suffix}"


def measured_once(
    folder: Path, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A result with its settings and what it was measured on, from its file if there is one."""
    file = file_of(folder, name, settings, "json")
    if not file.is_file():
        figures = measure()
        machine = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": git_commit(),
        }
        write_json(file, {"row": name, **settings, **machine, **figures})
    return dict(json.loads(file.read_text("utf-8")))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows that have the same names."""
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    lines += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
