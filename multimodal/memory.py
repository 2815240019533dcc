"""The memory of the machine: how it is allocated, and how much of it is free."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
CHECKED_FROM = 2**28  # bytes; less is not worth a look at what is free


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


def available_memory() -> int | None:
    """Bytes that this process can still take: of the machine, its container and its limits.

    None: it is not known here.
    """
    found = [*_of_the_machine(), *_of_the_container(), *_of_the_process()]
    return max(0, min(found)) if found else None


def _of_the_machine() -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])


def _of_the_container() -> Iterator[int]:
    """The limit of the control group, without the files that Linux would drop from memory."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit, used = ((group / f"memory.{name}").read_text("ascii") for name in ("max", "current"))
        if limit.strip() != "max":
            lines = (group / "memory.stat").read_text("ascii").splitlines()
            stat = dict(line.split() for line in lines)
            yield int(limit) - int(used) + int(stat["inactive_file"])


def _of_the_process() -> Iterator[int]:
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            yield limit - pages * resource.getpagesize()


def check_memory(needed: float, what: str, lower: str = "") -> None:
    """Refuse work that does not fit into memory, before Linux kills the process in the midst of it.

    Args:
        needed: bytes, about.
        what: needs them.
        lower: the options that would need less.

    Raises:
        ValueError: says how much is needed, how much there is, and what to lower.
    """
    if needed < CHECKED_FROM:
        return
    free = available_memory()
    if free is not None and needed > free:
        advice = f": lower {lower}" if lower else ""
        raise ValueError(
            f"{what} needs about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are "
            f"free{advice}"
        )
