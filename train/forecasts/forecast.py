"""``multimodal info --config RECIPE``: measures or computes what a run will need.

A run of one rank is set up on this machine and these data, does a few steps, and keeps nothing. So
the forecast holds for any model and precision. A run of several ranks, or on a graphics card that
is not here, is computed: no other process is started, and no weight is made.
"""

import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from multimodal.model.layers.experts import idle_parameters
from multimodal.train.callbacks import EnergyLog
from multimodal.train.cli import TrainingCLI
from multimodal.train.cli import main as run
from multimodal.train.cost import peak_memory
from multimodal.train.forecasts.computed import computed, is_computed
from multimodal.train.run.best import ExportModel
from multimodal.train.run.progress import Progress, duration
from multimodal.train.run.stopping import GracefulStop

STEPS = 12  # steps to run
WARMUP = 4  # of these, not timed
HELP = f"""\
usage: multimodal info --config RECIPE [--KEY VALUE ...]

What a training run will need: parameters, memory and time. Runs {STEPS} steps of it on this machine
and keeps nothing. For several ranks, or a graphics card that is not here, all is computed. Takes
the options of `multimodal fit`.

examples:
  multimodal info --config scenes_joint.yaml
  multimodal info --config scenes_joint.yaml --model.size base --data.global_batch_size 256
  multimodal info --config my.yaml --trainer.accelerator gpu --trainer.devices 8
"""


class Forecast(L.Callback):
    """Prints the parameters, memory and time of a run.

    Args:
        max_steps: of the run, -1 if it has no limit.
        max_epochs: of the run, -1 if it has no limit.
    """

    def __init__(self, max_steps: int, max_epochs: int) -> None:
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.step_ends: list[float] = []  # seconds
        self._step = 0

    def on_train_start(self, *_: Any) -> None:
        self.step_ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step > self._step:  # a step may take several batches
            self._step = trainer.global_step
            self.step_ends.append(time.perf_counter())

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps_per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        limits = [self.max_steps, self.max_epochs * steps_per_epoch]
        steps = min((limit for limit in limits if limit > 0), default=0)
        seconds = [end - start for start, end in pairwise(self.step_ends)]
        step = statistics.median(seconds[WARMUP:] or seconds)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        idle = idle_parameters(pl_module)
        active = f", {trained + frozen - idle:,} active for a token" if idle else ""
        rows = {
            "parameters": f"{trained:,} to train, {frozen:,} frozen{active}",
            "memory": f"{peak_memory():.2f} GB at most, on each of {trainer.world_size} ranks",
            "step": f"{step:.3f} s",
            "run": f"{steps:,} steps in {duration(steps * step)}, without validations"
            if steps
            else "ends by the clock (max_time)",
        }
        print("\n".join(f"{name + ':':<12}{value}" for name, value in rows.items()))


@contextmanager
def ended_by_sigterm(folder: str) -> Iterator[None]:
    """End this process at once on SIGTERM, with its ranks: a forecast has nothing to finish.

    A handler would have to wait until the main thread, which may wait for another rank, is back in
    Python. So Python writes the signal to a pipe, and a thread reads it there.

    Args:
        folder: is deleted before.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while number := os.read(reader, 1):  # nothing: the pipe was closed
            if number[0] == signal.SIGTERM:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # Lightning adds none where one is
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)
        thread.join()
        os.close(reader)


class ForecastCLI(TrainingCLI):
    """Runs a few steps without a checkpoint, an export or a validation. Or it runs nothing."""

    def instantiate_classes(self) -> None:
        self.computes = is_computed(self.config[self.subcommand].trainer)
        if not self.computes:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if self.computes:
            print("\n".join(computed(self.config[subcommand])))
        else:
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand].trainer
        if self.config[self.subcommand].ckpt_path:
            raise ValueError("a forecast is of a run from its start: leave out --ckpt_path")
        steps = min(STEPS, config.max_steps) if config.max_steps > 0 else STEPS
        kwargs |= {"max_steps": steps, "limit_val_batches": 0}
        trainer = super().instantiate_trainer(**kwargs)
        writers = (Checkpoint, EnergyLog, ExportModel, GracefulStop, Progress)
        callbacks = [c for c in trainer.callbacks if not isinstance(c, writers)]  # type: ignore[attr-defined]
        forecast = Forecast(config.max_steps, config.max_epochs or -1)
        trainer.callbacks = [*callbacks, forecast]  # type: ignore[attr-defined]
        return trainer


@contextmanager
def _no_word_of_a_stop() -> Iterator[None]:
    """Lightning says that its training stopped, and no one has asked for a training."""

    def is_another(record: logging.LogRecord) -> bool:
        return "` stopped: " not in record.getMessage()

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(is_another)
    try:
        yield
    finally:
        log.removeFilter(is_another)


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    with _no_word_of_a_stop(), tempfile.TemporaryDirectory() as folder, ended_by_sigterm(folder):
        return run(["fit", "--config", *argv, "--output", folder], ForecastCLI)
