"""How long a step pauses for a checkpoint: written in its way, or in the background.

    python benchmarks/checkpoints.py [--width 1024] [--layers 8] [--steps 24] [--every 8]

A stack of matrices that AdamW trains, with the callback that runs use. Prints a JSON line for each
way: the median step, the pause of a step with a checkpoint (the interval after it, less the
median), the slowest step without one, the seconds of all steps, and the size of a checkpoint.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from multimodal.train.run.best import BestValidation
from multimodal.train.run.checkpoints import AtomicCheckpointIO, RunCheckpoints
from multimodal.train.run.folder import RunFolder


class Stack(L.LightningModule):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.width = width

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layers(torch.randn(256, self.width)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Clock(L.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def measure(background: bool, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run, clock = RunFolder(Path(folder)), Clock()
        saves = RunCheckpoints(run, options.every, 2, BestValidation("last"), background)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=options.steps + 1, default_root_dir=folder, logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[saves, clock],
            plugins=[AtomicCheckpointIO()],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(torch.zeros(options.steps + 1, 1))
        trainer.fit(Stack(options.width, options.layers), loader)
        size = run.last.stat().st_size
    seconds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    saving = [s for step, s in enumerate(seconds, 1) if step % options.every == 0]
    others = [s for step, s in enumerate(seconds, 1) if step % options.every]
    median = statistics.median(others)
    return {
        "background": background,
        "step_ms": round(1e3 * median, 1),
        "pause_ms": round(1e3 * (statistics.median(saving) - median), 1),
        "slowest_other_step_ms": round(1e3 * max(others[1:]), 1),
        "all_steps_s": round(sum(seconds), 2),
        "checkpoint_MB": round(size / 1e6),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--folder", help="on the disk to measure (default: of temporary files)")
    options = parser.parse_args()
    for background in (False, True):
        print(json.dumps(measure(background, options)), flush=True)


if __name__ == "__main__":
    main()
