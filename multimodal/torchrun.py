"""What torchrun and Lightning tell the processes that they start. Torch-free."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks. (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    return rank_and_world_size()[0] == 0


def check_one_process(verb: str) -> None:
    """Refuse torchrun for a command that is not shared by ranks.

    Raises:
        ValueError: if there are several ranks: each would write all of the same files.
    """
    _, ranks = rank_and_world_size()
    if ranks > 1:
        raise ValueError(
            f"WORLD_SIZE={ranks}: {verb} is the work of one process, and each of these would do "
            "all of it: start it without torchrun, or unset WORLD_SIZE"
        )


def is_restart() -> bool:
    """Whether torchrun has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart() -> bool:
    """Whether torchrun would start these processes again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def end_with_launcher() -> None:
    """In a rank that torchrun or Lightning has started: end at once when that process ends.

    Otherwise a rank whose launcher was killed waits for the others for minutes. On Linux only.
    """
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it ended in between
            os._exit(1)
