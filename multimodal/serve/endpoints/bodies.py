"""Bodies of requests: read within limits, and made into dataclasses."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from multimodal.files import UnreadableText, parse_json
from multimodal.schemas import construct
from multimodal.serve.endpoints.bridge import Disconnected
from multimodal.serve.engine.errors import ApiError, as_api_error

Asked = TypeVar("Asked")
LARGE = 1 << 16  # bytes of a body that is read in a thread


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """What clients may send, and what changes nothing here."""

    user: str | None = None
    metadata: Mapping[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


async def read_body(request: Request, make: type[Asked]) -> Asked:
    """The JSON of a request as a dataclass.

    A page of another site may send any text without asking, but nothing that is called JSON. (With
    a key it can send nothing at all.)

    Raises:
        ApiError: for what is wrong with it, or if a server without a key is not told that it is
            JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not request.app.state.engines.settings.keys:
        message = f"Content-Type: expected application/json, not {kind[:100]!r}"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        data = await request.body()
    except ClientDisconnect as error:
        raise Disconnected from error
    if len(data) > LARGE:  # a million messages take seconds, in which others are answered
        return await asyncio.to_thread(_parsed, data, make)
    return _parsed(data, make)


def _parsed(data: bytes, make: type[Asked]) -> Asked:
    try:
        return asked(make, parse_json(data))
    except UnreadableText as error:
        raise ApiError(400, f"the body is {error}", code="invalid_json") from error


def asked(make: type[Asked], values: Any) -> Asked:
    """A request as a dataclass. Raises ``ApiError`` for what is wrong with it."""
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return construct(make, values)
    except ValueError as error:
        raise as_api_error(error) from error
