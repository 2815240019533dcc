"""Work on many items at once, results in the order of the items."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
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
