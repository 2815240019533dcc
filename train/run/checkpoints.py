"""Checkpoints that a crash cannot damage, which of them are kept, and how damage is noticed."""

import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from multimodal.files import atomic_file, read_json, write_json
from multimodal.terminal import print_status
from multimodal.train.run.best import BestValidation
from multimodal.train.run.finite import check_finite, is_last_step
from multimodal.train.run.folder import RunFolder, remove

CHECKSUMS = "checksums.json"  # of the files of a sharded checkpoint, which is a folder
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
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values only. No code of a pickle is run.

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
    """

    def __init__(self, run: RunFolder, every: int, keep: int, best: BestValidation) -> None:
        if every < 1 or keep < 0:
            raise ValueError(
                f"checkpoint_every={every}, keep={keep}: expected at least 1 and at least 0 (all)"
            )
        self.run, self.every, self.keep, self.best = run, every, keep, best
        self._saved = -1  # the step
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step = step
        if self._saved != step:
            if step % self.every == 0 or is_last_step(trainer) or trainer.should_stop:
                self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        again = self._saved == trainer.global_step
        if self.best.improved or again or trainer.should_stop:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save this step. All ranks have to call.

        Raises:
            ValueError: if the loss or a weight is not a finite number, or it cannot be written.
        """
        check_finite(trainer, trainer.lightning_module)
        step = trainer.global_step
        path = self.run.checkpoints / f"step={step}.ckpt"
        # A sharded checkpoint is a folder, written in place: one of this step stays as it is.
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if not (sharded and self._saved == step):
            trainer.save_checkpoint(path, weights_only=False)
        self._saved = step
        if trainer.is_global_zero:
            if path.is_dir():
                write_checksums(path)
            link(self.run.last, path)
            if self.best.step == step:
                link(self.run.best, path)
            self._remove_older(path)
        trainer.strategy.barrier()

    def _remove_older(self, newest: Path) -> None:
        """Remove all but the newest ones and the best. A run that went back keeps later ones."""
        older = [p for p in saved_steps(self.run.checkpoints) if step_of(p) <= step_of(newest)]
        best = self.run.best.resolve() if self.run.best.exists() else None
        kept = max(self.keep, 2 if best in (None, newest.resolve()) else 1)
        for path in older[:-kept] if self.keep else []:
            if path.resolve() != best:
                remove(path)


def load_weights(module: L.LightningModule, checkpoint: Path, complete: bool = True) -> None:
    """Load the weights of a checkpoint, those that its run would export.

    Args:
        complete: the file is a checkpoint as a run writes it, not only its weights.

    Raises:
        ValueError: if they are of another model.
    """
    if complete:
        stored = AtomicCheckpointIO().load_checkpoint(checkpoint)
    else:
        stored = torch.load(checkpoint, weights_only=True)
    try:
        module.load_state_dict(stored["state_dict"])
        module.on_load_checkpoint(stored)  # where the weights come from
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: its weights do not fit the configuration") from error


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints ``step=N.ckpt`` of a folder, by N."""
    paths = [p for p in folder.glob("step=*.ckpt") if p.stem.removeprefix("step=").isdecimal()]
    return sorted(paths, key=step_of)


def link(name: Path, target: Path) -> None:
    """Make ``name`` a link to a file or folder beside it. It is never missing in between."""
    if name.is_dir() and not name.is_symlink():
        shutil.rmtree(name)
    with atomic_file(name) as part:
        part.unlink(missing_ok=True)
        try:
            part.symlink_to(target.name)
        except OSError:  # Windows needs a privilege for links
            shutil.copy(target, part)


# --- damage ---------------------------------------------------------------------------------------


def check_checkpoint(path: Path) -> None:
    """Compare every byte of a checkpoint with its checksums, before it is used.

    A checkpoint is a zip file of records, and torch writes the CRC-32 of each record. A sharded one
    is a folder of such files, with ``checksums.json`` beside them.

    Raises:
        ValueError: if it does not exist or is damaged. It names another checkpoint of the folder.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path}: not a file")
    reason = _damage(path)
    if reason is None:
        return
    others = [
        other
        for other in reversed(saved_steps(path.resolve().parent))
        if other.resolve() != path.resolve() and not _damage(other)
    ]
    name = f"{path} ({path.resolve().name})" if path.is_symlink() else str(path)
    another = f"resume from {others[0]}" if others else "there is no other checkpoint beside it"
    raise ValueError(f"{name}: the checkpoint is damaged ({reason}); {another}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)


def _damage_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as records:
            bad = records.testzip()
        torch._C.PyTorchFileReader(str(path))  # it reads the directory more strictly
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, struct.error) as error:
        return str(error) or type(error).__name__
    except (zipfile.BadZipFile, zlib.error) as error:
        return str(error).lower()
    return None if bad is None else f"the checksum of {bad} is wrong"


def _damage_of_folder(path: Path) -> str | None:
    if not (path / CHECKSUMS).exists():
        print_status(f"{path}: has no {CHECKSUMS}, so damage would not be noticed")
        return None
    try:
        expected = dict(read_json(path / CHECKSUMS))
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is not JSON"
    found = _checksums(path)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"{', '.join(wrong)}: missing or changed" if wrong else None


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of every file of a sharded checkpoint."""
    write_json(folder / CHECKSUMS, _checksums(folder))


def _checksums(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            crc = 0
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    crc = zlib.crc32(block, crc)
            found[path.relative_to(folder).as_posix()] = crc
    return found
