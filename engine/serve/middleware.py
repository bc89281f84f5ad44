"""What happens to every request before and after its endpoint: key, body limits, draining, access log.

Plain ASGI: one layer, no task and no queue of its own, so that a stream's chunks pass through unchanged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import sys
import time
import uuid
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serve.errors import ApiError, error_response
from engine.serve.json_values import BYTES_PER_VALUE, WEIGHT, ValueCount, most_values
from engine.serve.settings import ServeSettings

log = logging.getLogger("engine.serve")

_REQUEST_ID, _LONGEST_ID = b"x-request-id", 128

OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/favicon.ico"})
"""Paths that need no key: they tell nothing that a key would protect."""


class Admitting(Protocol):
    """What the gate needs to know of a server."""

    settings: ServeSettings
    draining: bool


class Gate:
    """The layer around the application.

    Args:
        app: the application.
        serving: the server.
        tells_id: answers have the header X-Request-Id, the client's own or a new one; else another layer adds it.
    """

    def __init__(self, app: ASGIApp, serving: Admitting, *, tells_id: bool = True) -> None:
        self._app = app
        self._tells_id = tells_id
        self._serving = serving
        self._keys = [_digest(key.encode()) for key in serving.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, sent = time.perf_counter(), 0, 0
        request_id = _request_id(scope)

        async def watched(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._tells_id:
                    message = {**message, "headers": [*message.get("headers", ()), (_REQUEST_ID, request_id)]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            try:
                self._admit(scope)
                await self._app(scope, self._limited(scope, receive), watched)
            except ApiError as error:
                if status:
                    raise
                await error_response(error, scope["path"])(scope, receive, watched)
        finally:
            if self._serving.settings.log_requests:
                self._log(scope, request_id, status, sent, time.perf_counter() - begun)

    def _admit(self, scope: Scope) -> None:
        """Refuse what must not reach an endpoint."""
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._serving.draining and path not in OPEN_PATHS:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
        if self._keys and path not in OPEN_PATHS and not path.startswith("/static/"):
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            if not self._is_known(key):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._serving.settings.max_body:
            raise self._too_large()

    def _is_known(self, key: bytes) -> bool:
        """Compare with every key, in the same time whatever the key is."""
        digest, known = _digest(key), False
        for one in self._keys:
            known |= hmac.compare_digest(one, digest)
        return known

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._serving.settings.max_body} bytes", code="request_too_large"
        )

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """receive() that refuses bodies that are too large, have too many values, or take too long."""
        settings = self._serving.settings
        until = time.perf_counter() + settings.read_timeout
        size, complete = 0, False
        values, most = ValueCount(), most_values(settings.max_body)

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(until - time.perf_counter(), 0.0)):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {settings.read_timeout:g} s", code="request_timeout"
                ) from None
            if message["type"] == "http.request":
                data = message.get("body", b"")
                size += len(data)
                complete = not message.get("more_body", False)
                if size > settings.max_body:
                    raise self._too_large()
                values.add(data)
                if complete and values.n > most:  # a client that still sends would not read the answer
                    raise ApiError(
                        413,
                        f"the body has {values.n} JSON values, where a list, an object and a field count as {WEIGHT}; "
                        f"allowed: at most {most}; send fewer at a time, or start the server with a larger --max-body, "
                        f"which allows one value for each {BYTES_PER_VALUE} bytes",
                        code="request_too_large",
                    )
            return message

        return limited

    def _log(self, scope: Scope, request_id: bytes, status: int, sent: int, seconds: float) -> None:
        client = scope.get("client")
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request_id.decode("ascii"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "bytes": sent,
            "seconds": round(seconds, 4),
        }
        print(json.dumps(entry), file=sys.stderr, flush=True)


def _request_id(scope: Scope) -> bytes:
    """The id that a client or a proxy gave a request, where it is fit for headers and logs; else a new one."""
    given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
    if 0 < len(given) <= _LONGEST_ID and given.isascii() and given.decode("ascii").isprintable():
        return bytes(given)
    return uuid.uuid4().hex.encode()


def _digest(key: bytes) -> bytes:
    """Of fixed length, so that a comparison does not tell the length of a key either."""
    return hashlib.sha256(key).digest()
