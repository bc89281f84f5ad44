"""Errors as clients see them: a status, and an object in the words of the API that was called.

One place decides which error of the engine has which status; the dialects only differ in how the object looks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from engine.errors import ContextFullError, DeviceError, EngineError, InvalidRequestError, Portable, TokenizerError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {500: "api_error", 501: "api_error", 503: "overloaded_error", 405: "invalid_request_error"}


class ApiError(Portable):
    """What ends a request with a status other than 200.

    Attributes:
        status: of HTTP.
        message: for the person who wrote the client.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: further headers of the answer.
        extra: further keys of the error's object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, message)  # what copies are made with
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def as_api_error(error: BaseException, names: Mapping[str, str] | None = None) -> ApiError:
    """The error that a client gets for any exception.

    Args:
        error: what was raised.
        names: for names of SamplingParams with which a message may begin, those that the client used.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextFullError):
        extra = {"type": "exceed_context_size_error", "n_prompt_tokens": error.length, "n_ctx": error.limit}
        return ApiError(400, str(error), code="context_length_exceeded", extra=extra)
    if isinstance(error, (InvalidRequestError, TokenizerError)):
        message, param = str(error), None
        begin = re.match(r"(?:a token id of )?(\w+)", message)
        if begin is not None and names and begin[1] in names:
            param = names[begin[1]]
            message = message[: begin.start(1)] + param + message[begin.end(1) :]
        elif message.startswith(("messages", "tools")):
            param = re.split(r"[\s\[]", message)[0]
        elif message.startswith(("a prompt", "the prompt", "token id")):
            param = "prompt"
        return ApiError(400, message, param=param, code="invalid_value")
    if isinstance(error, DeviceError):
        return ApiError(500, str(error), code="device_error")
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, MemoryError):
        return ApiError(500, "the system gives no more memory for this request", code="out_of_memory")
    return ApiError(500, f"unexpected {type(error).__name__}: {error}", code="internal_error")


def error_object(error: ApiError, path: str) -> dict[str, Any]:
    """The body of an answer in the words of the API to which the path belongs."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error.status, error.type)
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    if path.startswith("/api/"):
        return {"error": error.message}
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code if error.code is not None else error.status,
            **error.extra,
        }
    }


def error_response(error: ApiError, path: str) -> Response:
    """The answer for an error."""
    headers = dict(error.headers)
    if error.status in (408, 413, 503):  # what else the client sends is not read, or the server is about to end
        headers.setdefault("Connection", "close")
    if error.status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    return json_response(error_object(error, path), error.status, headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON text."""
    return Response(dump(value), status, dict(headers or {}), media_type="application/json")


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dump(value: Any) -> bytes:
    """JSON text in UTF-8."""
    try:
        return _encoder.encode(value).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: escapes can say it
        return json.dumps(value, allow_nan=False).encode()
