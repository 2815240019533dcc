"""Memory: how it is allocated, how much of it is free, and what to do when there is not enough."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import GeneratorType
from typing import Any, TypeVar

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
CHECKED_FROM = 2**28  # bytes; less is not worth a look at what is free
# How allocators say it. Of these only torch's on CUDA has a class of its own.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
_DEVICES = ("CUDA", "HIP", "MPS", "XPU", "CUBLAS", "CUDNN")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


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


class NotEnoughMemory(ValueError):
    """Work that would not fit into the memory that is free now."""


def check_memory(needed: float, what: str, lower: str = "") -> None:
    """Refuse work that does not fit into memory, before Linux kills the process in the midst of it.

    Args:
        needed: bytes, about.
        what: needs them.
        lower: the options that would need less.

    Raises:
        NotEnoughMemory: says how much is needed, how much there is, and what to lower.
    """
    if needed < CHECKED_FROM:
        return
    free = available_memory()
    if free is not None and needed > free:
        advice = f": lower {lower}" if lower else ""
        raise NotEnoughMemory(
            f"{what} needs about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are "
            f"free{advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Python's error, that of torch on a GPU, and that of torch on a CPU, which has no class."""
    return isinstance(error, MemoryError) or any(reason in str(error) for reason in _NO_MEMORY)


def of_a_device(error: BaseException) -> bool:
    """Whether it is the memory of a GPU that was not enough."""
    return any(name in str(error) for name in _DEVICES)


def says_what_to_lower(function: FunctionT) -> FunctionT:
    """A function or generator function whose errors of memory say what to change, in a note."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _noted():
            result = function(*args, **kwargs)
        return _noted_items(result) if isinstance(result, GeneratorType) else result

    return wrapper  # type: ignore[return-value]


def _noted_items(items: Iterator[Any]) -> Iterator[Any]:
    with _noted():
        yield from items


@contextmanager
def _noted() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and not hasattr(error, "__notes__"):
            other = ', or load(..., dtype="bfloat16") or device="cpu"' * of_a_device(error)
            error.add_note(
                "Not enough memory: give fewer inputs at once, or lower batch_size, beams, "
                f"candidates or max_tokens{other}."
            )
        raise
