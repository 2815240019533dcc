"""Threads that encode images while the thread of the scheduler decodes tokens."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from threadpoolctl import threadpool_limits

MOST = 4  # images at once
Given = ParamSpec("Given")
Value = TypeVar("Value")


class Encoders:
    """Several images at once, each by its share of the processor's cores.

    A network of many small layers keeps no two cores busy with one image: two images, each on a
    core of its own, are done sooner. What an image gives does not depend on those beside it.
    """

    def __init__(self) -> None:
        cores = torch.get_num_threads()
        count = min(MOST, cores)
        self._pool = ThreadPoolExecutor(count, "encoder", _limit_threads, (cores // count,))

    def submit(
        self, function: Callable[Given, Value], *arguments: Given.args, **more: Given.kwargs
    ) -> "Future[Value]":
        """Call a function in one of the threads, without gradients."""
        return self._pool.submit(torch.inference_mode()(function), *arguments, **more)

    def stop(self) -> None:
        """What has not begun is cancelled."""
        self._pool.shutdown(cancel_futures=True)


def _limit_threads(count: int) -> None:
    """Let operations of this thread use so many cores, and leave those of other threads alone."""
    torch.get_num_threads()  # sets the number of a new thread when it is first asked for
    threadpool_limits(count, user_api="openmp")
