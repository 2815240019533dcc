"""Errors in the shape of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

import re
from typing import Any

from multimodal.memory import NotEnoughMemory, is_out_of_memory

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "server_error",
}
# What a ValueError of this package begins with: the name of the value that is wrong.
_NAMED = re.compile(r"([A-Za-z_][\w.]*)(?:=|: )")


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: one line.
        param: the name of the value that is wrong.
        code: a name of the error for programs.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after = code, retry_after

    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": KINDS.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def as_api_error(error: BaseException) -> ApiError:
    """A ``ValueError`` is the client's mistake. Anything else is ours, and is not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError) and not isinstance(error, NotEnoughMemory):
        named = _NAMED.match(str(error))
        return ApiError(400, str(error), param=named[1] if named else None, code="invalid_value")
    if isinstance(error, NotEnoughMemory) or is_out_of_memory(error):  # for a request that is right
        message = "the server has not enough memory for this now: try again later"
        return ApiError(503, message, code="no_memory", retry_after=5)
    return ApiError(500, "the server failed on this request", code="internal_error")
