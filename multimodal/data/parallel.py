"""Work on many units at once, in threads, in processes, by Ray, or shared by the ranks of torchrun.

Whichever does it, results come in the order of the units. A unit is done again where its process
was killed, so doing one twice must give the same, and half a unit must not look like a whole one.
"""

import fcntl
import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

In = TypeVar("In")
Out = TypeVar("Out")
Engine: TypeAlias = Literal["processes", "ray"]
MAX_DEATHS = 3  # of processes in a row, at one unit, after which it is given up
UNITS_PER_WORKER = 2  # units for each worker that are under way or done, and not yet asked for
RANK_TIMEOUT = 600.0  # seconds a unit of another rank is waited for
POLL_INTERVAL = 0.05  # seconds between two looks for what another rank does


@contextmanager
def exclusive_lock(folder: Path, lock: str) -> Iterator[None]:
    """Errors: ``ValueError`` where another process is at work in the folder."""
    path = folder / lock
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is writing to it") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be locked here ({error.strerror})") from error
        # The one that was at work may have ended, and taken its lock away, between the two lines.
        if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            raise ValueError(f"{folder}: another process is writing to it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def map_ordered(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """``map`` over threads (Pillow decodes outside the GIL), with a bounded number in flight.

    So the results are made while the caller works on earlier ones; with 0 workers they are not.
    """
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


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun tells them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def map_units(
    function: Callable[[In], Out],
    units: Iterable[In],
    engine: Engine = "processes",
    workers: int = 1,
    done: Callable[[In], bool] | None = None,
) -> Iterator[Out]:
    """``map`` over units of work that take seconds; function, units and results can be pickled.

    workers: processes; 1 works in this one. ``done`` says whether a unit's result is on the disk:
    with it, ranks share the units. The first rank waits for those of the others, and calls
    ``function`` on them, which finds them done; another rank gets the results of its own only.
    Errors: those of ``function``; ``ChildProcessError`` where processes die again and again.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine {engine!r}: expected one of {', '.join(get_args(Engine))}")
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    rank, world = rank_and_world_size()
    if world > 1 and done is not None:
        numbered = enumerate(units)
        if rank:
            units = (unit for number, unit in numbered if number % world == rank)
        else:
            units = (
                _wait_until_done(done, unit) if number % world else unit
                for number, unit in numbered
            )
    if engine == "ray":
        yield from _map_by_ray(function, units, workers)
    elif workers == 1:
        yield from map(function, units)
    else:
        yield from _map_by_processes(function, units, workers)


def _wait_until_done(done: Callable[[In], bool], unit: In) -> In:
    """The unit, as soon as another rank is done with it, or has been at it for so long that it may
    be lost: to do it twice does no harm. Torchrun ends all ranks if one fails."""
    start = time.monotonic()
    while not done(unit) and time.monotonic() < start + RANK_TIMEOUT:
        time.sleep(POLL_INTERVAL)
    return unit


def worker_context(*preloaded: str) -> BaseContext:
    """How workers start. Forking a process that already runs threads can dead-lock.

    So they are forked from a server process that only imported ``preloaded``: a spawned one would
    import all of it anew, with torch seconds of work for each.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if preloaded:
        context.set_forkserver_preload(list(preloaded))
    return context


def _submit(pool: Executor, function: Callable[[In], Out], unit: In) -> Future[Out]:
    """``pool.submit``; a pool that broke in the meantime says so when the result is asked for."""
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
    pool: Executor = ProcessPoolExecutor(workers, worker_context())
    try:
        while True:
            while len(pending) < UNITS_PER_WORKER * workers and (more := list(islice(waiting, 1))):
                pending.append((more[0], _submit(pool, function, more[0])))
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
                pool = ProcessPoolExecutor(workers, worker_context())
                pending = deque((unit, _submit(pool, function, unit)) for unit, _ in pending)
                continue
            pending.popleft()
            deaths = 0
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _call(function: Callable[[In], Out], unit: In) -> Out:
    return function(unit)


def _map_by_ray(function: Callable[[In], Out], units: Iterable[In], workers: int) -> Iterator[Out]:
    """A cluster is used where RAY_ADDRESS names one; ``workers`` units are in flight at a time."""
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
                raise error.cause from None  # our own error, without Ray's traceback in its text
            yield result
    finally:
        if started:
            ray.shutdown()
