"""What keeps a run: checkpoints that are whole or not there, and one more when it is stopped."""

import os
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

from multimodal.train.callbacks import print_status


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a crash or a full disk leaves the last.

    Lightning's own goes through the system's temporary folder; where that is another disk, it is
    copied over the last one, which can end in the middle.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:  # the latter is torch's for a write that failed
            raise ValueError(
                f"{path}: the checkpoint could not be written (a full disk?); the one before it is "
                f"whole, and --ckpt_path goes on with it: {str(error).splitlines()[0]}"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain values only, from wherever: no code of a pickle is run."""
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        return loaded


class LinkedCheckpoint(ModelCheckpoint):
    """``last.ckpt`` is a link to the newest checkpoint, and at no moment to none.

    Lightning's own leads nowhere from when the one before is removed until it is made anew.
    """

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
            part = link.with_name(f"{link.name}.part")
            part.unlink(missing_ok=True)
            try:
                part.symlink_to(Path(filepath).name)
            except OSError:  # on Windows it takes a privilege
                shutil.copy(filepath, part)
            part.replace(link)
        trainer.strategy.barrier()


class GracefulStop(L.Callback):
    """On SIGTERM, and on the first Ctrl-C, of any rank: ends the step, and saves it to ``path``.

    In a validation, it is the next step. Lightning's own handler would stop there, where no state
    can be saved from which a run goes on exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: dict[int, Any] = {}
        self._asked = 0  # the number of the signal
        self._saved = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if not self._asked:
            again = "; Ctrl-C again stops at once" * (number == signal.SIGINT)
            print_status(f"stopping after this step{again}")
        self._asked = number
        # Another SIGTERM (a scheduler's, and torchrun's) changes nothing: it must not get to
        # Lightning's handler, which waits for the other ranks wherever this one is.
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of gradients that add up, which no checkpoint holds
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False):
            path = self.path
            if isinstance(trainer.strategy, ModelParallelStrategy):
                # In parts, a checkpoint is written where it stays: not over one that is whole.
                path = path.with_name(f"stopped-{trainer.global_step}.ckpt")
            trainer.save_checkpoint(path)
            print_status(f"stopped at step {trainer.global_step:,}; go on with --ckpt_path {path}")
            self._saved = True

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self._saved:  # and the step is in the log by now
            raise SIGTERMException(128 + (self._asked or signal.SIGTERM))

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.on_train_batch_start()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._restore()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._restore()
