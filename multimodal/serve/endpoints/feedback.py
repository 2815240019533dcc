"""``/v1/feedback``: what people think of a reply, noted in the record."""

from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from multimodal.serve.endpoints.bodies import read_body
from multimodal.serve.endpoints.noting import note_of
from multimodal.serve.engine.engine import Engines
from multimodal.serve.engine.errors import ApiError

MAX_COMMENT = 4000  # characters


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """About a reply: its ``id``, or the ``x-request-id`` of its response.

    reason: of a thumbs-down. hallucination: the reply names what is not in the picture.
    """

    id: str
    rating: Literal["up", "down"]
    comment: str = ""
    reason: Literal["hallucination", "wrong", "harmful"] | None = None


async def feedback(request: Request, engines: Engines) -> Response:
    given = await read_body(request, Feedback)
    if not engines.settings.record:
        raise ApiError(
            404, "this server keeps no record, so feedback has no place", code="no_record"
        )
    if not 0 < len(given.id) <= 200 or len(given.comment) > MAX_COMMENT:
        raise ApiError(
            400, f"id: 1 to 200 characters, comment: {MAX_COMMENT:,} at most", param="id"
        )
    note = note_of(request)
    note.facts |= {"kind": "feedback", "about": given.id, "rating": given.rating}
    if given.reason:
        note.facts["reason"] = given.reason
    if given.comment:
        note.texts["comment"] = given.comment
    return JSONResponse({"object": "feedback", "id": given.id, "rating": given.rating})
