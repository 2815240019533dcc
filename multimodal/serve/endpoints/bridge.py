"""Between the event loop, which talks to clients, and the scheduler's thread, which computes."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from multimodal.inference.decode import Row
from multimodal.serve.engine.scheduler import Job, Scheduler, Steps

Value = TypeVar("Value")
CLIENT_LEFT = 499  # nginx's status for it; nobody reads it


class Disconnected(Exception):
    """The client has gone."""


@dataclass(frozen=True)
class Piece:
    """A piece of output that a row has finished, or a request without rows."""

    row: Row | None
    piece: Any


@dataclass(frozen=True)
class Result:
    """What the steps of a request returned. It is the last event."""

    value: Any


async def events(scheduler: Scheduler, steps: Steps) -> AsyncIterator[Piece | Result]:
    """Run the steps of a request. If nobody listens any more, they are cancelled.

    Raises:
        ApiError: if the server takes no request now.
        Exception: what the steps raise.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | Result]()

    def tell(event: Piece | Result) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(queue.put_nowait, event)

    job = Job(steps, lambda row, piece: tell(Piece(row, piece)), lambda end: tell(Result(end)))
    scheduler.submit(job)
    try:
        while True:
            event = await queue.get()
            if isinstance(event, Result) and isinstance(event.value, Exception):
                raise event.value
            yield event
            if isinstance(event, Result):
                return
    finally:
        scheduler.cancel(job)


async def finished(scheduler: Scheduler, steps: Steps) -> Any:
    """What the steps of a request return. Raises what they raise."""
    async with aclosing(events(scheduler, steps)) as stream:  # type: ignore[type-var]
        async for event in stream:
            if isinstance(event, Result):
                return event.value


async def outcome(scheduler: Scheduler, steps: Steps) -> Any:
    """The same, or the error."""
    try:
        return await finished(scheduler, steps)
    except Exception as error:
        return error


async def result_of(request: Request, scheduler: Scheduler, steps: Steps) -> Any:
    """What the steps of a request return.

    Raises:
        Disconnected: if the client leaves before. The steps are cancelled.
    """
    return await unless_left(request, finished(scheduler, steps))


async def unless_left(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """What a coroutine returns.

    Raises:
        Disconnected: if the client leaves before. The coroutine is cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    """Wait until the client has gone. The body of the request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
