"""How a run ends when it is told to: it saves the step, and leaves a model."""

import signal
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import distributed_c10d

from multimodal.distributed import global_counts, host_group, world_size
from multimodal.terminal import print_status
from multimodal.train.run.best import ExportModel
from multimodal.train.run.checkpoints import RunCheckpoints


class GracefulStop(L.Callback):
    """On SIGTERM or the first Ctrl-C on any rank, finishes the step, and saves it and a model.

    During a validation it finishes the next step. Lightning's handler would stop inside the
    validation, where no checkpoint can be saved that resumes exactly.

    Args:
        checkpoints: saves the step. None: nothing is saved.
        export: writes the model, if no validation has yet.
    """

    def __init__(
        self, checkpoints: RunCheckpoints | None, export: ExportModel | None = None
    ) -> None:
        self.checkpoints, self.export = checkpoints, export
        self._before: dict[int, Any] = {}
        self._signal = 0  # 0: no signal yet
        self._stopping = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        if world_size() > 1:
            # Lightning asks in each step whether a rank got SIGTERM, and waits for the GPU.
            loop: Any = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = lambda: None
            set_timeout(trainer.strategy._timeout, host_group())  # type: ignore[attr-defined]

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self._signal:
            again = "; Ctrl-C again stops at once" * (number == signal.SIGINT)
            print_status(f"stopping after this step{again}")
        self._signal = number
        # Only SIGINT gets its old handler back. A second SIGTERM (the scheduler and torchrun both
        # send one) must not reach Lightning's handler, which waits for the other ranks at once.
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients are being accumulated, and no checkpoint holds them
        self._step = trainer.global_step
        if not any(global_counts([bool(self._signal)])):
            return
        self._stopping = True
        stopped = f"stopped at step {trainer.global_step:,}"
        if self.checkpoints is not None:
            self.checkpoints.save(trainer)
            self.checkpoints.writer.wait()
            stopped += f"; resume with --ckpt_path {self.checkpoints.run.last}"
        if self.export is not None:
            if not self.export.best.count:
                self.export.export(trainer, pl_module)
            stopped += f"; {self.export.folder}: {self.export.describe(trainer)}"
        if trainer.is_global_zero:
            print_status(stopped)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self._stopping:  # one batch later, so that the step is in the log
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM))

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.on_train_batch_start()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._restore()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._restore()


def set_timeout(timeout: timedelta, group: Any) -> None:
    """How long operations of a group of ranks may take. None: of the default group."""
    # torch has the public function since 2.14, and the private one before.
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    change(timeout, group)
