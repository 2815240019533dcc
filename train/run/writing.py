"""Writes a checkpoint in the way of the training, or beside it: whole, or not at all.

In the background the step waits only until the state is copied into memory. Files are then written
by a thread: of plain runs by the first rank, of sharded ones by every rank
(torch.distributed.checkpoint.async_save). The temporary name becomes ``step=N.ckpt`` when all ranks
have written and the checksums are there. So a killed run leaves the checkpoints before.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies.fsdp import _METADATA_FILENAME  # type: ignore[attr-defined]
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save

from multimodal.files import atomic_file, temporary_path
from multimodal.train.run.damage import renew_checksum, saved_steps, write_checksums
from multimodal.train.run.folder import remove

GIVE_UP = 60.0  # seconds that a run which has failed waits for its last checkpoint
OLD = ".old"  # ends the name of a checkpoint while another one takes its place


def is_sharded(strategy: Strategy) -> bool:
    """Whether checkpoints are folders, in which each rank writes its part."""
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time. All ranks call all methods together.

    Args:
        background: the training goes on while the files are written. It takes memory for one more
            copy of weights and optimizer, on the host.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self._threads: ThreadPoolExecutor | None = None
        self._group: Any = None  # the threads of the ranks must not meet their training steps
        self._pending: Future[Any] | None = None

    def write(self, trainer: L.Trainer, path: Path, publish: Callable[[], None]) -> None:
        """Write the state of this step, when the checkpoint before is complete.

        Args:
            publish: is called on the first rank when the checkpoint is complete.

        Raises:
            ValueError: if this one, or in the background the one before, could not be written.
        """
        self.wait()
        sharded, first = is_sharded(trainer.strategy), trainer.is_global_zero
        part = temporary_path(path) if sharded else path
        if sharded:
            if first and part.exists():
                remove(part)
            trainer.strategy.barrier()
        if not self.background:
            with one_line_errors():
                trainer.save_checkpoint(part, weights_only=False)
                if first and sharded:
                    complete(part, path)
            if first:
                publish()
            trainer.strategy.barrier()
            return
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if sharded:
            if self._group is None:  # it waits for a rank as long as the training does
                timeout = getattr(trainer.strategy, "_timeout", None)
                self._group = dist.new_group(timeout=timeout, backend="gloo")
            written = self._write_parts(state, part)
            self._pending = written
            if first:
                rest = copied(state)

                def finish() -> None:
                    written.result()
                    torch.save(rest, part / _METADATA_FILENAME)
                    complete(part, path)
                    publish()

                self._pending = self._thread.submit(finish)
        elif first:
            whole = copied(state)

            def save() -> None:
                trainer.strategy.checkpoint_io.save_checkpoint(whole, path)
                publish()

            self._pending = self._thread.submit(save)

    def write_rest(self, trainer: L.Trainer, path: Path) -> None:
        """Write again what a sharded checkpoint has beside weights and optimizer, such as scores.

        Raises:
            ValueError: if it could not be written.
        """
        self.wait()
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        rest = {
            name: state[name] for name in state if name not in ("state_dict", "optimizer_states")
        }
        if trainer.is_global_zero:
            with one_line_errors():
                with atomic_file(path / _METADATA_FILENAME) as part:
                    torch.save(rest, part)
                renew_checksum(path, _METADATA_FILENAME)

    def _write_parts(self, state: dict[str, Any], part: Path) -> Future[Any]:
        """Begin to write this rank's weights and optimizer, and take them out of the state.

        The names are those of Lightning, which loads them.
        """
        parts = {"state_dict": state.pop("state_dict")}
        for number, optimizer in enumerate(state.pop("optimizer_states", [])):
            parts[f"optimizer_{number}"] = optimizer
        written = async_save(parts, checkpoint_id=part, process_group=self._group)
        assert isinstance(written, Future)
        return written

    @property
    def _thread(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "checkpoint")
        return self._threads

    def check(self) -> None:
        """Raise the error of a checkpoint that has failed meanwhile. Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            ValueError: if it could not be written.
            TimeoutError: if it takes longer than so many seconds.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with one_line_errors():
            pending.result(seconds)

    def close(self) -> None:
        """End the threads. A run that has failed waits for its last checkpoint, but not for ever:
        the rank that it would need may be gone."""
        try:
            self.wait(GIVE_UP)
        except (ValueError, TimeoutError):
            pass  # another error has ended the run
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Make a ValueError of what torch raises when files cannot be written: on another rank, too."""
    try:
        yield
    except TimeoutError:
        raise
    except (CheckpointException, OSError, RuntimeError) as error:
        cause: BaseException = error
        while isinstance(cause, CheckpointException) and cause.failures:
            cause = next(iter(cause.failures.values()))[0]
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ValueError(
            f"a checkpoint could not be written (is the disk full?); resume from the one before it "
            f"with --ckpt_path: {reason}"
        ) from error


def complete(part: Path, path: Path) -> None:
    """Give a folder that is written its checksums and its name."""
    write_checksums(part)
    old = path.with_name(f".{path.name}{OLD}")
    if path.exists():  # of a run that went back to an earlier step
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what a run that was killed has left between its checkpoints.

    A checkpoint that it was replacing gets its name back. In a folder without checkpoints it is of
    another run, which has been removed.
    """
    goes_on = bool(saved_steps(folder))
    for left in list(folder.glob(".step=*.ckpt.*")):
        path = left.with_name(left.stem.removeprefix("."))
        if left.suffix == OLD and goes_on and not path.exists():
            left.rename(path)
        else:
            remove(left)


def copied(value: Any, copies: dict[Any, Tensor] | None = None) -> Any:
    """A copy in memory of the host that no later step changes.

    Tensors that share their memory, as tied weights do, share it in the copy.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        same = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        if same not in copies:
            copies[same] = value.detach().to("cpu", copy=True)
        return copies[same]
    if isinstance(value, dict):
        new = copy.copy(value)  # with the attribute _metadata of a state_dict
        for key, item in value.items():
            new[key] = copied(item, copies)
        return new
    if type(value) in (list, tuple):
        return type(value)(copied(item, copies) for item in value)
    return copy.deepcopy(value)
