"""Map a function over units of work: threads, processes, Ray tasks, or the ranks of torchrun.

Results come in the order of the units, whatever does the work. A unit whose process was killed runs
again. So running a unit twice must give the same result, and half a result must not look complete.

Worker processes end when the main process does: after its work, after an error or Ctrl-C, and when
it is killed.
"""

import fcntl
import logging
import multiprocessing
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from multimodal.torchrun import rank_and_world_size

In = TypeVar("In")
Out = TypeVar("Out")
Engine: TypeAlias = Literal["processes", "ray"]
MAX_WORKERS = 1024  # processes or threads: more would take all memory before they do anything
MAX_DEATHS = 3  # processes killed in a row at one unit, before the map fails
UNITS_PER_WORKER = 2  # units submitted ahead of the caller
RANK_TIMEOUT = 600.0  # seconds to wait for the unit of another rank
POLL_INTERVAL = 0.05  # seconds between two looks at the work of another rank


@contextmanager
def exclusive_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock file ``name`` in a folder.

    Raises:
        ValueError: if another process holds it, or if the file system has no locks.
    """
    path = folder / name
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is writing to it") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be locked here ({error.strerror})") from error
        # Between open and flock the other process may have ended and deleted its lock file.
        if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            raise ValueError(f"{folder}: another process is writing to it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def map_ordered(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """``map`` over threads, with a bounded number of items in flight.

    Pillow decodes outside the GIL, so threads are enough for images.

    Args:
        function: is called in a thread.
        items: are read as results are taken.
        workers: number of threads. 0 calls ``function`` in the caller's thread.

    Yields:
        The results in the order of the items.

    Raises:
        ValueError: for more than MAX_WORKERS.
    """
    if workers > MAX_WORKERS:
        raise ValueError(f"{workers:,} threads: expected at most {MAX_WORKERS:,}")
    if workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def map_units(
    function: Callable[[In], Out],
    units: Iterable[In],
    engine: Engine = "processes",
    workers: int = 1,
    done: Callable[[In], bool] | None = None,
) -> Iterator[Out]:
    """``map`` over units of work that take seconds each.

    With ``done``, the ranks of torchrun share the units. The first rank waits for the units of the
    other ranks. Then it calls ``function`` on them, which has to find the result on the disk. Every
    other rank yields only the results of its units.

    Args:
        function: is pickled, as are units and results.
        units: the work, in order.
        engine: processes or ray.
        workers: number of processes. 1 works in this process.
        done: whether the result of a unit is on the disk.

    Yields:
        The results in the order of the units.

    Raises:
        ValueError: for an unknown engine, less than one worker, or more than MAX_WORKERS.
        ChildProcessError: if worker processes are killed MAX_DEATHS times in a row.
        Exception: any error of ``function``.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine {engine!r}: expected one of {', '.join(get_args(Engine))}")
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers={workers}: expected 1 to {MAX_WORKERS:,}")
    rank, world_size = rank_and_world_size()
    if world_size > 1 and done is not None:
        numbered = enumerate(units)
        if rank:
            units = (unit for number, unit in numbered if number % world_size == rank)
        else:
            units = (
                _wait_until_done(done, unit) if number % world_size else unit
                for number, unit in numbered
            )
    if engine == "ray":
        yield from _map_by_ray(function, units, workers)
    elif workers == 1:
        yield from map(function, units)
    else:
        yield from _map_by_processes(function, units, workers)


def _wait_until_done(done: Callable[[In], bool], unit: In) -> In:
    """Return the unit when another rank is done with it, or after RANK_TIMEOUT.

    After the timeout this rank does the unit too. That does no harm. If a rank fails, torchrun ends
    all of them.
    """
    start = time.monotonic()
    while not done(unit) and time.monotonic() < start + RANK_TIMEOUT:
        time.sleep(POLL_INTERVAL)
    return unit


def worker_context(*preloaded: str) -> BaseContext:
    """How worker processes start: forked from a server process that imported ``preloaded``.

    A fork of a process with threads can dead-lock. A spawned process would import everything
    again, which takes seconds with torch.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*(preloaded or ["__main__"]), "multimodal.worker_server"])
    # The server, and so all workers, never see a Ctrl-C. It would be a traceback while they import.
    # What tracks resources is started before: that would let the signal through again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def end_with_main(worker: int = 0) -> None:
    """In a worker process: leave Ctrl-C to the main process, and end at once when it ends.

    A worker waits for work on a pipe that it holds open itself, and its parent, the fork server,
    lives as long as its children. So neither tells that the main process was killed. Its sentinel
    does: a pipe whose other end only the main process has.

    Args:
        worker: a number that torch's DataLoader gives, not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is None:
        return
    sentinel: int = main.sentinel
    if hasattr(os, "O_ASYNC"):
        # The kernel ends the process (SIGIO), even if it is in the middle of a long computation.
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_end_after, args=(sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    select.select([sentinel], [], [])
    os._exit(1)


def _new_pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, worker_context(), initializer=end_with_main)


def _kill(pool: ProcessPoolExecutor) -> None:
    """End the workers of a pool in the middle of their units."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def _submit(pool: Executor, function: Callable[[In], Out], unit: In) -> Future[Out]:
    """``pool.submit``, but the error of a broken pool comes with the result."""
    try:
        return pool.submit(function, unit)
    except BrokenProcessPool as error:
        broken: Future[Out] = Future()
        broken.set_exception(error)
        return broken


def _map_by_processes(
    function: Callable[[In], Out], units: Iterable[In], workers: int
) -> Iterator[Out]:
    waiting, pending = iter(units), deque[tuple[In, Future[Out]]]()
    deaths = 0
    pool = _new_pool(workers)
    try:
        while True:
            for unit in islice(waiting, UNITS_PER_WORKER * workers - len(pending)):
                pending.append((unit, _submit(pool, function, unit)))
            if not pending:
                return
            try:
                result = pending[0][1].result()
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise ChildProcessError(
                        f"a worker process was killed {MAX_DEATHS} times at the same unit of work; "
                        "is memory short? Fewer workers need less of it. (A script that starts "
                        "them needs: if __name__ == '__main__')"
                    ) from error
                pool.shutdown(cancel_futures=True)
                pool = _new_pool(workers)
                pending = deque((unit, _submit(pool, function, unit)) for unit, _ in pending)
                continue
            pending.popleft()
            deaths = 0
            yield result
    except BaseException:  # Ctrl-C too: what a worker does now would be lost anyway
        _kill(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _call(function: Callable[[In], Out], unit: In) -> Out:
    return function(unit)


def _map_by_ray(function: Callable[[In], Out], units: Iterable[In], workers: int) -> Iterator[Out]:
    """Use the cluster of RAY_ADDRESS, or start one here, with ``workers`` tasks at a time."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine ray: install it: pip install 'multimodal[ray]'") from error
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        if "RAY_ADDRESS" not in os.environ:
            options["num_cpus"] = workers
        ray.init(logging_level=logging.ERROR, **options)
    task: Any = ray.remote(num_cpus=1, max_retries=MAX_DEATHS)(_call)
    waiting, pending = iter(units), deque[Any]()
    try:
        while True:
            for unit in islice(waiting, UNITS_PER_WORKER * workers - len(pending)):
                pending.append(task.remote(function, unit))
            if not pending:
                return
            try:
                result: Out = ray.get(pending.popleft())
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # our error, without Ray's traceback in its text
            yield result
    finally:
        if started:
            ray.shutdown()
