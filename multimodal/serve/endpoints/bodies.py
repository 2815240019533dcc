"""Bodies of requests: read within limits, and made into dataclasses."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
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
    """A request as a dataclass. Null is the same as nothing, also in its messages: clients send a
    reply with all of its fields.

    Raises:
        ApiError: for what is wrong with it.
    """
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    given = _without_nulls(values)
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [_without_nulls(m) if isinstance(m, dict) else m for m in messages]
    try:
        return construct(make, given)
    except ValueError as error:
        raise as_api_error(error) from error


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


async def read_form(
    request: Request, make: type[Asked], max_size: int
) -> tuple[Asked, dict[str, bytes]]:
    """The fields of a form as a dataclass, and its files ``image`` and ``mask``.

    Args:
        max_size: bytes of a field.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "expected multipart/form-data", code="invalid_form")
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=4, max_fields=64, max_part_size=max_size) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    name = name.removesuffix("[]")
                    if name in files:
                        raise ApiError(400, f"{name}: expected one file", param=name)
                    files[name] = await value.read()
                else:
                    values[name] = _typed(make, name, value)
    except ClientDisconnect as error:
        raise Disconnected from error
    if unknown := sorted(set(files) - {"image", "mask"}):
        raise ApiError(400, f"{unknown[0]:.50}: expected files image and mask")
    if "image" not in files:
        raise ApiError(400, "image: is missing", param="image")
    return asked(make, values), files


def _typed(make: Any, name: str, text: str) -> Any:
    """A field of a form as the type that a dataclass has for it."""
    kinds = {item.name: str(item.type) for item in fields(make)}
    kind = kinds.get(name, "")
    try:
        if "[int," in kind:
            return int(text)
        if "[float," in kind:
            return float(text)
    except ValueError:
        return text
    if "bool" in kind:
        return {"true": True, "false": False}.get(text.lower(), text)
    return text
