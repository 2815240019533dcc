"""What malloc is told on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks, rather than give them back and get them anew, zeroed.

    Every batch and every step frees and takes the same activations; without this, page faults are a
    third of the time of captions on a CPU, and up to half of that of a step of training
    (docs/decisions/training_speed.md). A process keeps what it needed at its peak, and those it
    starts have to be told themselves. Does nothing where there is no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)
