"""Where torch computes, and in which numbers. ``auto`` is the best that works here.

Nothing here imports torch before it is needed, so that ``--help`` stays fast.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager, contextmanager
from operator import attrgetter
from threading import Lock
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, get_args

from multimodal.terminal import print_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Before = TypeVar("Before")
DType = Literal["auto", "float32", "bfloat16"]
DTYPES = get_args(DType)
_FLOAT32 = ("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")  # of torch.backends


def choose_device(device: "str | torch.device" = "auto") -> "torch.device":
    """The device of a name, after it has computed something.

    Args:
        device: as torch names it, or ``auto``: CUDA, else MPS, else the CPU. A GPU that cannot be
            used is named on stderr. Under torchrun, ``auto`` and ``cuda`` are a GPU for each rank.

    Raises:
        ValueError: for a device that torch cannot compute on here.
    """
    import torch

    names = [str(device)]
    if str(device) == "auto":
        usable = (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available))
        names = [name for name, is_available in usable if is_available()] + ["cpu"]
    for name in names[:-1]:
        try:
            return _tried(_of_this_rank(name))
        except ValueError as error:
            print_error(f"{error}; trying the next device")
    return _tried(_of_this_rank(names[-1]))


def choose_dtype(
    dtype: "str | torch.dtype" = "auto", device: "str | torch.device" = "cpu"
) -> "torch.dtype":
    """The dtype of a name, float32 or bfloat16.

    Args:
        dtype: ``auto`` is bfloat16 where the device has it in hardware (CUDA from Ampere on), else
            float32.
        device: where the network will be.

    Raises:
        ValueError: for another dtype.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(torch.device(device)) else torch.float32
    kind = names.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in names.values():
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    assert kind is not None
    return kind


def has_slow_bfloat16(device: "str | torch.device") -> bool:
    """Whether bfloat16 is only emulated there: a CPU of x86 without AVX-512.

    Products are then five times slower than in float32 (docs/decisions/training_speed.md).
    """
    import torch

    return torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def warn_of_slow_bfloat16(device: "str | torch.device", instead: str) -> None:
    """Say so on stderr if bfloat16 is slow there, and which option chooses float32 instead."""
    if has_slow_bfloat16(device):
        print_error(
            "this processor has no instructions for bfloat16, which is slower than float32 here: "
            f"give {instead}"
        )


def add_in_one_order() -> None:
    """Let products of MKL add in the same order wherever their numbers lie in memory.

    Otherwise bits of a result depend on addresses on CPUs with AVX-512
    (docs/decisions/decoding_speed.md). For this process and those that it starts, before the first
    product. What the user has set stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def moved(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """A tensor on a device. The host does not wait until a copy to a CUDA device is done.

    That needs pinned memory. torch keeps it for the next copies.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class SharedSetting(Generic[Before]):
    """A setting of the process that is another one while any thread is inside ``held``.

    Args:
        change: makes it, and returns what it was. The first thread to enter calls it.
        restore: takes that. The last one to leave calls it.
    """

    def __init__(self, change: Callable[[], Before], restore: Callable[[Before], object]) -> None:
        self._change, self._restore = change, restore
        self._lock, self._threads = Lock(), 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._threads == 0:
                self._before = self._change()
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0:
                    self._restore(self._before)


def full_float32() -> "_GeneratorContextManager[None]":
    """Let products and convolutions of float32 use all of its bits, on any device.

    Otherwise cuDNN computes convolutions in TF32, which has 10 bits of 23, and so do products if a
    user allows it (``torch.set_float32_matmul_precision``). An image on a GPU would then have other
    codes than on a CPU. The settings are those of the process: see ``SharedSetting``.
    """
    return _full_float32.held()


def _use_full_float32() -> list[str]:
    import torch

    settings = attrgetter(*_FLOAT32)(torch.backends)
    before = [each.fp32_precision for each in settings]
    _set_float32(["ieee"] * len(settings))
    return before


def _set_float32(precisions: list[str]) -> None:
    import torch

    for each, precision in zip(attrgetter(*_FLOAT32)(torch.backends), precisions, strict=True):
        each.fp32_precision = precision


_full_float32 = SharedSetting(_use_full_float32, _set_float32)


def _has_bfloat16(device: "torch.device") -> bool:
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _of_this_rank(name: str) -> str:
    if name == "cuda" and (rank := os.environ.get("LOCAL_RANK", "")).isdecimal():
        import torch

        # A launcher can show each rank its own GPU alone, which then is the first one.
        return "cuda:0" if torch.cuda.device_count() == 1 else f"cuda:{rank}"
    return name


def _tried(device: str) -> "torch.device":
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of names that are out of use
            usable = torch.ones(1, device=device).add(1).item() == 2
        reason = "it does not compute"
    except Exception as error:  # each kind of device has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        usable = False
    if not usable:
        raise ValueError(f"device={device!r:.80}: cannot be used here ({reason:.200})")
    return torch.device(device)
