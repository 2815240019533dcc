"""Checkpoints that a crash cannot damage, and which of them are kept."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from multimodal.files import atomic_file
from multimodal.train.run.best import BestValidation
from multimodal.train.run.copies import CheckpointCopies
from multimodal.train.run.damage import saved_steps, step_of
from multimodal.train.run.finite import check_finite, is_last_step
from multimodal.train.run.folder import RunFolder, link, remove
from multimodal.train.run.writing import (
    GIVE_UP,
    CheckpointWriter,
    clear_unfinished,
    is_sharded,
)

PARTS = {"state_dict": dict, "loops": dict, "callbacks": dict, "global_step": int}


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
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values only, into memory of the host. No code of a pickle is run.

        The GPU that saved them may be missing here, or in use by another rank.

        Raises:
            ValueError: for a file that is no checkpoint of a training.
        """
        try:
            loaded: Any = super().load_checkpoint(path, map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # pickle and torch raise many kinds for a file of another kind
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: not a checkpoint of a training: {reason}") from error
        for name, kind in PARTS.items():
            if not isinstance(loaded, dict) or not isinstance(loaded.get(name), kind):
                raise ValueError(f"{path}: not a checkpoint of a training: it has no {name}")
        if "epoch_progress" not in loaded["loops"].get("fit_loop", {}):
            raise ValueError(f"{path}: not a checkpoint of a training: it has no progress")
        return loaded


class RunCheckpoints(Checkpoint):
    """Saves ``step=N.ckpt`` in the folder of a run, and keeps the best and the newest ones.

    ``last.ckpt`` is a link to the newest checkpoint, and ``best.ckpt`` to that of the best
    validation. Both are valid at all times. At least two are kept: if one is damaged, another is
    there.

    A checkpoint at the step of a validation is saved before it, and again after it. A resumed run
    does not repeat that validation, and early stopping must know its score.

    Args:
        run: the folder.
        every: steps between two checkpoints. One more is saved at the last step, and one after each
            validation that is the best so far.
        keep: the newest ones that are kept. 0 keeps all.
        best: knows the best validation.
        background: the training goes on while a checkpoint is written.
        copies: at an address, which get checkpoints when they are complete, while the training
            goes on. The last one is waited for at the end.
    """

    def __init__(
        self,
        run: RunFolder,
        every: int,
        keep: int,
        best: BestValidation,
        background: bool = False,
        copies: CheckpointCopies | None = None,
    ) -> None:
        if every < 1 or keep < 0:
            raise ValueError(
                f"checkpoint_every={every}, keep={keep}: expected at least 1 and at least 0 (all)"
            )
        self.run, self.every, self.keep, self.best = run, every, keep, best
        self.writer, self.copies = CheckpointWriter(background), copies
        self._saved = -1  # the step
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            clear_unfinished(self.run.checkpoints)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step = step
        self.writer.check()
        if self._saved != step:
            if step % self.every == 0 or is_last_step(trainer) or trainer.should_stop:
                self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        again = self._saved == trainer.global_step
        if self.best.improved or again or trainer.should_stop:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.writer.wait()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.writer.close()
        if self.copies is not None:  # a run that was told to stop ends as one that is done
            self.copies.wait(None if isinstance(exception, SIGTERMException) else GIVE_UP)

    def teardown(self, *_: Any, **__: Any) -> None:
        self.writer.close()
        if self.copies is not None:  # here no other rank waits for the first one any more
            self.copies.wait()

    def save(self, trainer: L.Trainer) -> None:
        """Save this step. All ranks have to call.

        Raises:
            ValueError: if the loss or a weight is not a finite number, or it cannot be written.
        """
        check_finite(trainer, trainer.lightning_module)
        step = trainer.global_step
        path = self.run.checkpoints / f"step={step}.ckpt"
        best = self.best.step == step

        def publish() -> None:
            link(self.run.last, path)
            if best:
                link(self.run.best, path)
            self._remove_older(path)
            if self.copies is not None:
                self.copies.put(path, best)

        if is_sharded(trainer.strategy) and self._saved == step:  # not all of it twice
            self.writer.write_rest(trainer, path)
            if trainer.is_global_zero:
                publish()
            trainer.strategy.barrier()
        else:
            self.writer.write(trainer, path, publish)
        self._saved = step

    def _remove_older(self, newest: Path) -> None:
        """Remove all but the newest ones and the best. A run that went back keeps later ones."""
        older = [p for p in saved_steps(self.run.checkpoints) if step_of(p) <= step_of(newest)]
        best = self.run.best.resolve() if self.run.best.exists() else None
        kept = max(self.keep, 2 if best in (None, newest.resolve()) else 1)
        for path in older[:-kept] if self.keep else []:
            if path.resolve() != best:
                remove(path)


def load_weights(module: L.LightningModule, checkpoint: Path, rest: Path | None = None) -> None:
    """Load the weights of a checkpoint, those that its run would export.

    Args:
        rest: of a checkpoint of which the file has the weights alone, where the rest is.

    Raises:
        ValueError: if they are of another model.
    """
    if rest is None:
        stored = AtomicCheckpointIO().load_checkpoint(checkpoint)
    else:
        stored = torch.load(rest, map_location="cpu", weights_only=True)
        stored |= torch.load(checkpoint, map_location="cpu", weights_only=True)
    try:
        module.load_state_dict(stored["state_dict"])
        module.on_load_checkpoint(stored)  # where the weights come from
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: its weights do not fit the configuration") from error
