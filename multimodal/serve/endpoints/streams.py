"""Server-sent events, as OpenAI's clients read them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response, StreamingResponse

from multimodal.serve.endpoints.noting import Note
from multimodal.serve.engine.errors import as_api_error

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def server_sent(value: Any, event: str | None = None) -> bytes:
    """One event. value: what becomes JSON."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


async def event_stream(events: AsyncIterator[bytes], note: Note) -> Response:
    """A response of events.

    The first one is awaited here, so that an error before it has a status of its own. A later error
    is the last event.
    """
    iterator = events.__aiter__()
    try:
        first = await anext(iterator)
    except StopAsyncIteration:
        first = b""

    async def rest() -> AsyncIterator[bytes]:
        try:
            yield first
            async for event in iterator:
                yield event
        except Exception as error:
            note.facts["code"] = as_api_error(error).code
            yield server_sent(as_api_error(error).body())
        finally:
            await iterator.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(rest(), media_type="text/event-stream", headers=HEADERS)
