"""``multimodal info --config RECIPE``: what a run will need, by its first steps.

The run is set up as it would be, on this machine and these data, and does a few steps of which
nothing is kept: so what it says holds for any model, precision and strategy.
"""

import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from multimodal.train.callbacks import ExportModel
from multimodal.train.checkpointing import GracefulStop
from multimodal.train.cli import TrainingCLI
from multimodal.train.cli import main as run
from multimodal.train.cost import peak_memory

STEPS, WARMUP = 12, 4  # done, and not counted of them
HELP = f"""\
usage: multimodal info --config RECIPE [--KEY VALUE ...]

What a training run will need: its parameters, the memory and the time, measured by {STEPS} steps of
it on this machine. Nothing is kept. Takes what `multimodal fit` takes.

examples:
  multimodal info --config scenes_joint.yaml
  multimodal info --config scenes_joint.yaml --model.size base --data.global_batch_size 256
"""


class Forecast(L.Callback):
    """Prints what a run needs that ends after so many steps and epochs (-1: neither)."""

    def __init__(self, max_steps: int, max_epochs: int) -> None:
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.ends: list[float] = []
        self._step = 0

    def on_train_start(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step > self._step:  # batches may add up to a step
            self._step = trainer.global_step
            self.ends.append(time.perf_counter())

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        an_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        planned = [self.max_steps, self.max_epochs * an_epoch]
        steps = min((one for one in planned if one > 0), default=0)
        seconds = [end - start for start, end in pairwise(self.ends)]
        step = statistics.median(seconds[WARMUP:] or seconds)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        rows = {
            "parameters": f"{trained:,} to train, {frozen:,} frozen",
            "memory": f"{peak_memory():.2f} GB at most, on each of {trainer.world_size} ranks",
            "step": f"{step:.3f} s",
            "run": f"{steps:,} steps in {format_duration(steps * step)}, without validations"
            if steps
            else "ends by the clock (max_time)",
        }
        print("\n".join(f"{name + ':':<12}{value}" for name, value in rows.items()))


def format_duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class ForecastCLI(TrainingCLI):
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        asked = self.config[self.subcommand].trainer
        if self.config[self.subcommand].ckpt_path:
            raise ValueError("a forecast is of a run from its start: leave out --ckpt_path")
        steps = min(STEPS, asked.max_steps) if asked.max_steps > 0 else STEPS
        kwargs |= {"max_steps": steps, "limit_val_batches": 0}
        trainer = super().instantiate_trainer(**kwargs)
        kept = (ModelCheckpoint, ExportModel, GracefulStop)
        own = [one for one in trainer.callbacks if not isinstance(one, kept)]  # type: ignore[attr-defined]
        trainer.callbacks = [*own, Forecast(asked.max_steps, asked.max_epochs or -1)]  # type: ignore[attr-defined]
        return trainer


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    with tempfile.TemporaryDirectory() as folder:
        return run(["fit", "--config", *argv, "--output", folder], ForecastCLI)
