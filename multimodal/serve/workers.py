"""Several processes behind one address: they are started, watched, started again, and stopped.

Each worker listens at the address itself, and the kernel deals new connections out among them
(SO_REUSEPORT, Linux). So a worker that dies takes its own connections with it, and no others: new
ones go to those that live. This process listens to nobody.
"""

import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, TypeAlias

from multimodal.data.parallel import end_with_main

# Called in a process of its own, with the number of the worker and what it calls when it answers.
Target: TypeAlias = Callable[[int, Callable[[], None]], None]
PAUSE = 5.0  # seconds before a worker that never answered is started again
TICK = 0.2  # seconds between two looks at what signals have said
LATE = 5.0  # seconds after the stop in which a worker may still end by itself
log = logging.getLogger("multimodal.serve")


@dataclass
class _Worker:
    """process: None between two processes. again: when the next one is started."""

    number: int
    process: SpawnProcess | None = None
    ready: Connection | None = None
    answers: bool = False
    again: float = 0.0


class Supervisor:
    """Runs a function in several processes until a signal comes.

    Args:
        target: what a worker does. It can be pickled.
        count: how many workers there are.
        stop_timeout: seconds in which they end after SIGTERM.
        on_ready: is called when the first worker answers.
    """

    def __init__(
        self, target: Target, count: int, stop_timeout: float, on_ready: Callable[[], Any]
    ) -> None:
        self.target, self.stop_timeout, self.on_ready = target, stop_timeout, on_ready
        self.workers = [_Worker(number) for number in range(count)]
        self.stopping = threading.Event()

    def run(self) -> int:
        """Watch workers until SIGINT or SIGTERM. A second one ends them in the midst of requests.

        Returns:
            The exit status, as ``watch``.
        """
        before = {each: signal.signal(each, self._told) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self.watch()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def watch(self) -> int:
        """Start workers, and again those that end, until ``stopping`` is set. Then all end.

        The first worker starts alone: if it ends before it answers, there are no others.

        Returns:
            The exit status: 1 if the first worker never answered.
        """
        try:
            first, started = self.workers[0], False
            while not self.stopping.is_set():
                for worker in self.workers if started else [first]:
                    self._look_at(worker)
                if first.answers and not started:
                    started = True
                    self.on_ready()
                elif not started and first.process is None:
                    return 1
                processes = [each.process for each in self.workers if each.process is not None]
                readers = [each.ready for each in self.workers if each.ready is not None]
                wait([*(process.sentinel for process in processes), *readers], TICK)
            log.warning("stopping when requests are answered; a second signal ends them at once")
            return 0
        finally:
            self._stop()

    def _told(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.is_set():
            for worker in self.workers:
                if worker.process is not None:
                    with suppress(ValueError):  # it has ended, and was closed
                        worker.process.kill()
        self.stopping.set()

    def _look_at(self, worker: _Worker) -> None:
        """Note that it answers or has ended, and start it again."""
        if worker.process is None:
            if time.monotonic() >= worker.again:
                self._start(worker)
            return
        if worker.ready is not None and worker.ready.poll():
            with suppress(EOFError):
                worker.ready.recv()
                worker.answers = True
            worker.ready.close()
            worker.ready = None
        if worker.process.exitcode is not None:
            log.error(
                "worker %d (process %d) ended with status %d: it is started again",
                worker.number, worker.process.pid, worker.process.exitcode,
            )  # fmt: skip
            worker.again = time.monotonic() + (0 if worker.answers else PAUSE)
            worker.process.close()
            worker.process, worker.answers = None, False

    def _start(self, worker: _Worker) -> None:
        context = multiprocessing.get_context("spawn")
        worker.ready, writer = context.Pipe(duplex=False)
        worker.process = context.Process(
            target=_run, args=(self.target, worker.number, writer), name=f"worker {worker.number}"
        )
        worker.process.start()
        writer.close()

    def _stop(self) -> None:
        processes = [each.process for each in self.workers if each.process is not None]
        for process in processes:
            process.terminate()
        end = time.monotonic() + self.stop_timeout + LATE
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        for each in self.workers:
            each.process, each.answers = None, False


def _run(target: Target, number: int, ready: Connection) -> None:
    """In a worker: Ctrl-C is the supervisor's, and if that is killed the worker ends at once."""
    end_with_main()
    target(number, lambda: ready.send(True))


def shared_socket(host: str, port: int) -> socket.socket:
    """A socket of an address that several processes have together, bound and not listening."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def check_free(host: str, port: int) -> None:
    """Raises ``OSError`` if somebody listens there: a shared socket would join them."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind((host, port))
