"""A setting of the memory allocator for work on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed, and reuse them.

    By default it returns them to the system and gets new ones, filled with zeros. Every batch and
    every step frees and allocates the same activations. Without this, page faults are a third of
    the time of captions on a CPU, and up to half of the time of a training step
    (docs/decisions/training_speed.md).

    The process keeps the memory of its peak. Processes that it starts have to call this, too.
    Without mallopt nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)
