"""From which checkpoint a run goes on: by name, by address, or because it was started again."""

import time
from pathlib import Path
from typing import Any

from multimodal.distributed import gather_objects
from multimodal.files import address_of
from multimodal.torchrun import is_restart, may_restart
from multimodal.train.run.copies import CheckpointCopies, alone
from multimodal.train.run.damage import check_checkpoint
from multimodal.train.run.folder import RunFolder, is_first_rank
from multimodal.train.run.writing import OLD, clear_unfinished

AUTO = "auto"  # the last checkpoint if there is one, else a new run
PATIENCE = 60.0  # seconds that a rank waits until the first one has cleared the folder


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
    if fit and not config.trainer.fast_dev_run:
        clear_before_choosing(run)
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
    if fit and copy is not None and not config.ckpt_path and copy.has_any:
        raise ValueError(
            f"{copy.address}: has checkpoints of another run, which this one would replace: go on "
            f"with --ckpt_path {AUTO}, or give another --checkpoint_copy"
        )
    if config.ckpt_path and address_of(config.ckpt_path):
        folder, _, name = config.ckpt_path.rpartition("/")
        copies = CheckpointCopies(folder)
        path = copies.fetch(name.removesuffix(".ckpt"), run.checkpoints)
        config.ckpt_path = str(path)
    elif config.ckpt_path:
        check_checkpoint(Path(config.ckpt_path))


def clear_before_choosing(run: RunFolder) -> None:
    """Put the folder of a run that was killed in order, so that no checkpoint is missed.

    If it was killed while it replaced a checkpoint, that one has another name, and ``last.ckpt``
    may lead nowhere. The first rank clears the folder, and the others wait for it.

    Raises:
        ValueError: if another run is writing to the folder.
    """
    folder = run.checkpoints
    if not is_first_rank():
        end = time.monotonic() + PATIENCE
        while any(folder.glob(f".step=*.ckpt{OLD}")) and time.monotonic() < end:
            time.sleep(0.1)
    elif any(folder.glob(".step=*.ckpt.*")):
        # What another run writes now, or another rank fetches, looks the same.
        with run.locked(), alone(folder):
            clear_unfinished(folder)


def check_same_checkpoint(path: str | None) -> None:
    """Refuse to train if the ranks have chosen different checkpoints.

    Each rank chooses in the folder that it sees, before the ranks connect. All ranks have to call,
    after they have connected and before anything is loaded.

    Args:
        path: the checkpoint of this rank. None: it starts a new run.

    Raises:
        ValueError: on all ranks. It names what each rank has.
    """
    # Of last.ckpt it is the step that counts.
    chosen = gather_objects([Path(path).resolve().name if path else "none (a new run)"])
    if len(set(chosen)) == 1:
        return
    ranks_of: dict[str, list[str]] = {}
    for rank, name in enumerate(chosen):
        ranks_of.setdefault(name, []).append(str(rank))
    parts = [
        f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{', ...' * (len(ranks) > 8)}: {name}"
        for name, ranks in ranks_of.items()
    ]
    raise ValueError(
        f"the ranks would resume from different checkpoints ({'; '.join(parts)}): --output has to "
        "be a folder that all ranks see; or give each machine the same file with --ckpt_path"
    )
