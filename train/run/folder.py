"""The folder of a run: what lies where in it, whose it is, and what may be replaced.

RUN/logs/  RUN/validate/  RUN/test/  RUN/checkpoints/  RUN/model/ or RUN/adapter/
RUN/predictions.jsonl
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.utilities import rank_zero_only

from multimodal.files import atomic_file, local_path

LOCK = ".lock"


def is_first_rank() -> bool:
    """Whether this process is the first rank of its run, before Lightning has connected them."""
    return not _get_rank()


def log_folder(trainer: L.Trainer) -> Path:
    """Where this run writes its logs and samples, whatever loggers it has.

    ``logs`` of a training, ``validate`` and so on of the other verbs: measuring a run must not
    change its log. Lightning's ``log_dir`` is the current folder for many loggers, and for none.
    """
    name = trainer.state.fn.value if trainer.state.fn else "fit"
    return Path(trainer.default_root_dir) / ("logs" if name == "fit" else name)


def archive(path: Path) -> None:
    """Rename the file of an earlier start: metrics.csv to metrics.1.csv, then metrics.2.csv ..."""
    if path.is_file():
        number = 1
        while (archived := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(archived)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, ``--output``."""

    path: Path

    def __post_init__(self) -> None:
        local_path(self.path)  # an address is an error now
        try:
            str(self.path).encode()  # its config.yaml names it
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.path}: the name of a run has to be UTF-8") from error

    @classmethod
    def of(cls, trainer: L.Trainer) -> "RunFolder":
        return cls(Path(trainer.default_root_dir))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """A link to the newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """A link to the checkpoint of the best validation, if there is one."""
        return self.checkpoints / "best.ckpt"

    @property
    def exports(self) -> tuple[Path, ...]:
        """The folders that runs write: a model, or an adapter of one."""
        return self.path / "model", self.path / "adapter"

    @property
    def has_export(self) -> bool:
        """Whether one of them is there, complete."""
        last = ("config.json", "adapter_config.json")
        return any((folder / name).is_file() for folder in self.exports for name in last)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: two runs in one folder would replace each other's files.

        The operating system frees the lock with the process, however it ends.

        Raises:
            ValueError: if another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.path}: another run is writing to this folder; give another --output"
                ) from error
            except OSError:  # a file system without locks
                pass
            yield

    def check_free(self, resumed: str | None) -> None:
        """Refuse to start a run where another one has left something.

        Args:
            resumed: the checkpoint that is resumed. One of this folder continues its run.

        Raises:
            ValueError: if the folder has checkpoints or a model of another run.
        """
        if resumed and Path(resumed).parent.resolve() == self.checkpoints.resolve():
            return
        has_model = self.has_export
        has_checkpoint = any(self.checkpoints.glob("*.ckpt"))
        if not (has_model or has_checkpoint):
            return
        held = " and ".join(["a model"] * has_model + ["checkpoints"] * has_checkpoint)
        resume = f"resume it with --ckpt_path {self.last}, " if has_checkpoint else ""
        raise ValueError(
            f"{self.path}: holds {held} of another run: {resume}give another --output, or "
            "--overwrite to replace them"
        )

    def clear(self) -> None:
        """Remove the checkpoints and the model of another run. Its logs stay."""
        for path in self.checkpoints.glob("*.ckpt"):
            remove(path)
        for folder in self.exports:
            shutil.rmtree(folder, ignore_errors=True)


class ClearFolder(L.Callback):
    """Removes what another run has left, when the first step of this one is about to begin."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    @rank_zero_only
    def on_train_start(self, *_: Any) -> None:
        self.run.clear()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: a file, a link, or a folder of a sharded run."""
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


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
