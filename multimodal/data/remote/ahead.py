"""Reading in advance: threads bring what a caller will need into the cache.

Errors are not reported here. The caller who reads the same bytes later gets them.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeAlias

CONNECTIONS = 16  # requests at a time
AHEAD = 1024  # samples that are read in advance
_Work: TypeAlias = Callable[[], object]


class Threads:
    """Threads that call functions in their order. They end with the process, and do not delay it.

    (A ThreadPoolExecutor would first do all work that waits.)
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self._process, self._queue = 0, SimpleQueue[_Work]()
        self._starting = threading.Lock()

    def submit(self, work: _Work) -> None:
        with self._starting:
            if self._process != os.getpid():  # threads do not survive a fork
                self._process, self._queue = os.getpid(), SimpleQueue[_Work]()
                for number in range(self.count):
                    name = f"{self.name}-{number}"
                    threading.Thread(
                        target=_work, args=(self._queue,), name=name, daemon=True
                    ).start()
        self._queue.put(work)


def _work(queue: SimpleQueue[_Work]) -> None:
    while True:
        work = queue.get()
        with suppress(Exception):
            work()


PLANNER = Threads("read-ahead-plan", 1)  # finds out which bytes: it may wait for indexes
READERS = Threads("read-ahead", CONNECTIONS)  # reads them
