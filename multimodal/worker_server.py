"""What the server that worker processes are forked from imports: it says when not to complain.

A worker that is just being started when its main process ends, or that hands over a result, finds
its queues half written and their semaphores gone. Nobody is left who could use that error.
"""

import atexit
import multiprocessing
import os
import select
import sys
import time
import traceback
from types import TracebackType

ENDING_TIME = 5.0  # seconds in which a main process ends that has begun to clear up


def _ends(pipe: int) -> bool:
    """Whether the other end of a pipe, which only the main process has, is closed soon."""
    os.set_blocking(pipe, False)
    latest = time.monotonic() + ENDING_TIME
    while (left := latest - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0] and not os.read(pipe, 1 << 16):
            return True
    return False


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    main = multiprocessing.parent_process()
    if main is not None:  # in a thread that hands results over, say
        pipe: int | None = main.sentinel
    else:  # multiprocessing.spawn._main and its caller have the pipe as a variable
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(trace)]
        pipe = next((f["parent_sentinel"] for f in frames if "parent_sentinel" in f), None)
    if pipe is None or not _ends(pipe):
        sys.__excepthook__(kind, error, trace)


if any("multiprocessing.forkserver" in word for word in sys.orig_argv):  # in no other process
    sys.excepthook = _report
    atexit.register(os._exit, 0)  # a second earlier than by taking torch apart
