"""Checkpoints that a crash cannot damage, and a last checkpoint when a run is stopped."""

import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from multimodal.files import atomic_file
from multimodal.train.callbacks import print_status


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it.

    A crash or a full disk leaves the last checkpoint as it was. Lightning writes to the temporary
    folder of the system. If that is on another disk, it then copies over the last checkpoint, and a
    crash during the copy damages it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, sync=True) as part, open(part, "wb") as file:
                torch.save(checkpoint, file)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
            raise ValueError(
                f"{path}: the checkpoint could not be written (is the disk full?); resume from the "
                f"one before it with --ckpt_path: {str(error).splitlines()[0]}"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values only. No code of a pickle is run."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class LinkedCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` a valid link to the newest checkpoint at all times.

    In Lightning the link is broken between the removal of the old checkpoint and the new link.

    A checkpoint at the step of a validation is saved before it, and again after it. A resumed run
    does not repeat that validation, and early stopping must know its score.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        training = trainer.state.fn == "fit" and not trainer.sanity_checking
        # A sharded checkpoint is a folder, written in place: do not overwrite the last one.
        whole = not isinstance(trainer.strategy, ModelParallelStrategy)
        if training and whole and self._last_global_step_saved == trainer.global_step:
            trainer.save_checkpoint(self._last_checkpoint_saved)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if self.save_last == "link" and self._last_checkpoint_saved:
            last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            self._link_checkpoint(trainer, self._last_checkpoint_saved, last)
        super()._remove_checkpoint(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            link = Path(linkpath)
            if link.is_dir() and not link.is_symlink():
                shutil.rmtree(link)
            with atomic_file(link) as part:
                part.unlink(missing_ok=True)
                try:
                    part.symlink_to(Path(filepath).name)
                except OSError:  # Windows needs a privilege for links
                    shutil.copy(filepath, part)
        trainer.strategy.barrier()


class GracefulStop(L.Callback):
    """On SIGTERM or the first Ctrl-C on any rank, finishes the step and saves a checkpoint.

    During a validation it finishes the next step. Lightning's handler would stop inside the
    validation, where no checkpoint can be saved that resumes exactly.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: dict[int, Any] = {}
        self._signal = 0  # 0: no signal yet
        self._saved = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)

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

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients are being accumulated, and no checkpoint holds them
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            path = self.path
            if isinstance(trainer.strategy, ModelParallelStrategy):
                # A sharded checkpoint is a folder, written in place: do not overwrite the last one.
                path = path.with_name(f"stopped-{trainer.global_step}.ckpt")
            trainer.save_checkpoint(path)
            print_status(f"stopped at step {trainer.global_step:,}; resume with --ckpt_path {path}")
            self._saved = True

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self._saved:  # one batch later, so that the step is in the log
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM))

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.on_train_batch_start()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._restore()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._restore()
