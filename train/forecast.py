"""``multimodal info --config RECIPE``: what a run will need, by its first steps.

The run is set up as it would be, on this machine and these data, and does a few steps of which
nothing is kept: so what it says holds for any model, precision and strategy.
"""

import statistics
import sys
import tempfile
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from multimodal.train.callbacks import ExportModel
from multimodal.train.cli import TrainingCLI
from multimodal.train.cli import main as run
from multimodal.train.cost import peak_memory
from multimodal.train.safety import StopGently

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
    """Prints what a run of ``planned`` steps needs; 0: of so many epochs."""

    def __init__(self, planned: int, epochs: int) -> None:
        self.planned, self.epochs = planned, epochs
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = self.planned or int(trainer.num_training_batches) * self.epochs
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        step = statistics.median(seconds[WARMUP:] or seconds)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        rows = {
            "parameters": f"{trained:,} to train, {frozen:,} frozen",
            "memory": f"{peak_memory():.2f} GB at most, on each of {trainer.world_size} ranks",
            "step": f"{step:.3f} s, {getattr(pl_module, 'tokens', 0) / step:,.0f} tokens/s a rank",
            "run": f"{steps:,} steps in {spoken(steps * step)}, without validations",
        }
        print("\n".join(f"{name + ':':<12}{value}" for name, value in rows.items()))


def spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class ForecastCLI(TrainingCLI):
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        asked = self.config[self.subcommand].trainer
        planned = max(0, asked.max_steps)
        steps = min(STEPS, planned) or STEPS
        kwargs |= {"max_steps": steps, "limit_val_batches": 0}
        trainer = super().instantiate_trainer(**kwargs)
        kept = (ModelCheckpoint, ExportModel, StopGently)
        own = [one for one in trainer.callbacks if not isinstance(one, kept)]  # type: ignore[attr-defined]
        trainer.callbacks = [*own, Forecast(planned, asked.max_epochs or 1)]  # type: ignore[attr-defined]
        return trainer


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    with tempfile.TemporaryDirectory() as folder:
        return run(["fit", "--config", *argv, "--output", folder], ForecastCLI)
