"""What a run says when another rank does not answer any more, and how long it waits for one."""

from datetime import timedelta

import lightning as L
import torch.distributed as dist

from multimodal.train.run.folder import RunFolder


def set_rank_timeout(trainer: L.Trainer, seconds: int) -> None:
    """Let a collective operation of the ranks fail after so many seconds. 0: after 30 minutes.

    Call before the ranks connect.

    Raises:
        ValueError: for a negative number.
    """
    if seconds < 0:
        raise ValueError(f"--rank_timeout {seconds}: expected 0 (30 minutes) or more seconds")
    if seconds and hasattr(trainer.strategy, "_timeout"):  # else there is one rank
        trainer.strategy._timeout = timedelta(seconds=seconds)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error comes from the connection to another rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "NCCL" in str(error))
    )


def lost_rank(trainer: L.Trainer, error: BaseException) -> ValueError:
    """The error of a run that has lost a rank: where, why, and how it goes on."""
    last = RunFolder.of(trainer).last
    left = f"resume with --ckpt_path {last}" if last.exists() else "there is no checkpoint yet"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    reason = reason.rpartition("] ")[2] or reason  # gloo begins with the name of a file
    return ValueError(
        f"step {trainer.global_step:,}: another rank has ended or does not answer any more "
        f"({reason[:200]}); {left}"
    )
