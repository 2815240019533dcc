"""From which checkpoint a run goes on: by name, by address, or because it was started again."""

from pathlib import Path
from typing import Any

from multimodal.files import address_of
from multimodal.torchrun import is_restart, may_restart
from multimodal.train.run.copies import CheckpointCopies
from multimodal.train.run.damage import check_checkpoint
from multimodal.train.run.folder import RunFolder

AUTO = "auto"  # the last checkpoint if there is one, else a new run


def find_checkpoint(config: Any, run: RunFolder, fit: bool) -> None:
    """Put a checked path in the place of ``ckpt_path``: of a name or an address. None: a new run.

    A start by torchrun in place of one that failed resumes its run by itself.

    Args:
        config: the options of a verb, as attributes. ``init_from`` becomes None if a run goes on.
        fit: a training, not a measurement of one.

    Raises:
        ValueError: for a checkpoint that does not exist or is damaged, and for options that
            contradict each other.
    """
    copy = CheckpointCopies(config.checkpoint_copy) if config.checkpoint_copy else None
    if fit and config.overwrite and (config.ckpt_path == AUTO or may_restart()):
        raise ValueError(
            f"--overwrite with --ckpt_path {AUTO} or torchrun --max-restarts: a second start "
            "would replace what the first has done; remove the folder, or give another --output"
        )
    if config.ckpt_path == AUTO or (fit and is_restart()):
        given = None if config.ckpt_path == AUTO else config.ckpt_path
        if run.last.exists():
            config.ckpt_path, config.init_from = "last", None
        elif copy is not None and copy.has_any:
            config.ckpt_path, config.init_from = f"{copy.address}/last.ckpt", None
        else:
            config.ckpt_path = given
    if config.init_from and config.ckpt_path:
        raise ValueError("--init_from starts a run, --ckpt_path resumes a run: give one of them")
    names = {"last": run.last, "best": run.best}
    if config.ckpt_path in names:
        config.ckpt_path = str(names[config.ckpt_path])
    if not fit and not (config.init_from or config.ckpt_path):
        if not run.last.exists():  # a file, or a folder of a sharded run
            raise ValueError(
                f"no weights to use: {run.last} does not exist; give --ckpt_path or --init_from"
            )
        config.ckpt_path = str(run.last)
    if config.ckpt_path and address_of(config.ckpt_path):
        folder, _, name = config.ckpt_path.rpartition("/")
        copies = CheckpointCopies(folder)
        path = copies.fetch(name.removesuffix(".ckpt"), run.checkpoints)
        config.ckpt_path = str(path)
    elif config.ckpt_path:
        check_checkpoint(Path(config.ckpt_path))
