"""Server-sent events, as OpenAI's clients read them."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from multimodal.serve.endpoints.bridge import CLIENT_LEFT, unless_left
from multimodal.serve.endpoints.noting import note_of
from multimodal.serve.engine.errors import as_api_error

Bytes: TypeAlias = AsyncGenerator[bytes, None]
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def server_sent(value: Any, event: str | None = None) -> bytes:
    """One event. value: what becomes JSON."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


async def event_stream(request: Request, events: Bytes) -> Response:
    """A response of events.

    The first one is awaited here, so that an error before it has a status of its own. A later error
    is the last event.

    Raises:
        Disconnected: if the client leaves before the first one.
    """
    note = note_of(request)

    async def first() -> bytes:
        return await anext(events, b"")

    async def rest(begin: bytes) -> Bytes:
        yield begin
        try:
            async for event in events:
                yield event
            note.status = None
        except Exception as error:
            told = as_api_error(error)
            note.failed(told)
            yield server_sent(told.body())

    begin = await unless_left(request, first())
    note.status = CLIENT_LEFT  # until all of it was sent
    return EventStream(rest(begin), events)


class EventStream(StreamingResponse):
    """A response that ends the work behind its events, however it ends itself."""

    def __init__(self, content: Bytes, events: Bytes) -> None:
        super().__init__(content, media_type="text/event-stream", headers=HEADERS)
        self.content, self.events = content, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events), aclosing(self.content):
            await super().__call__(scope, receive, send)
