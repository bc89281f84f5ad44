"""The front: takes requests of clients, gives each to a replica, and passes the answer on. Reads no model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from engine.cluster.conversation import conversation_of
from engine.cluster.metrics import labelled, summed
from engine.serve.answers.respond import LINES, error_event, gone
from engine.serve.errors import ApiError, error_response
from engine.serve.middleware import Gate
from engine.serve.models.model_store import ModelNames, ModelSpec
from engine.serve.settings import ServeSettings

log = logging.getLogger("engine.cluster")

METRICS_SECONDS = 5.0
"""For the replicas to tell their metrics; those that do not are left out."""
_PASSED_ON = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client",
)  # fmt: skip
_STREAMS = (b"text/event-stream", LINES.encode())
"""Kinds of answers in which an error can still be told."""
_LOST = ApiError(
    503, "the replica that had this request has ended; try again", code="replica_lost", headers={"Retry-After": "1"}
)
_NONE = ApiError(503, "no replica is ready; try again later", code="no_replica", headers={"Retry-After": "5"})


class FrontState:
    """What the gate needs of a server.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.draining = False


class Front:
    """An ASGI application.

    Args:
        specs: the models of the replicas.
        settings: of the server: keys and limits are checked here.
        replicas: Ray's handle of the deployment Replica.
    """

    def __init__(self, specs: Sequence[ModelSpec], settings: ServeSettings, replicas: Any) -> None:
        self._models = ModelNames(specs)
        self.state = FrontState(settings)
        self._replicas = replicas
        self._gate = Gate(self._answer, self.state, tells_id=False)  # Ray does

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await self._gate(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await self._answer_body(scope, await Request(scope, receive).body(), receive, send)

    async def _answer_body(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET" and scope["path"] in ("/metrics", "/metrics/replicas"):
            await self._metrics(scope, receive, send)
        else:
            await self._forward(scope, body, receive, send)

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Have a replica answer; what it sends is passed on as it comes."""
        given = {name: scope[name] for name in _PASSED_ON if name in scope}
        conversation = conversation_of(body, self._models) if scope["method"] == "POST" else None
        answer = self._replicas.options(stream=True).respond.remote(given, body, conversation=conversation)
        leaving = asyncio.ensure_future(gone(receive))
        leaving.add_done_callback(lambda done: None if done.cancelled() else answer.cancel())
        sent = Sent(send)
        try:
            async for messages in answer:
                for message in messages:
                    await sent(message)
        except BaseException as error:
            if leaving.done():
                log.debug("%s: the client has gone", scope["path"])
                return
            answer.cancel()
            found = _refusal(error)
            if found is None:
                raise
            log.warning("%s: %s", scope["path"], error)
            await sent.fail(found, scope, receive)
        finally:
            leaving.cancel()

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of all replicas: their sums, or each with a label `replica`."""
        told = self._replicas.broadcast("metrics")
        try:
            texts = [text.decode() for text in await told.results_async(timeout_s=METRICS_SECONDS)]
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            await error_response(ApiError(503, f"the replicas do not answer: {error}"), scope["path"])(
                scope, receive, send
            )
            return
        text = (labelled if scope["path"].endswith("/replicas") else summed)(texts)
        headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


class Sent:
    """What was sent of an answer, so that its failure is told in the form that is still possible.

    Args:
        send: takes the messages.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._streams = False

    async def __call__(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self._started = True
            # Ray adds the id of the request itself.
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            self._streams = any(value.startswith(_STREAMS) for _, value in headers)
            message = {**message, "headers": headers}
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Tell an error: as an answer, as a last event of a stream, or by breaking the connection."""
        if not self._started:
            await error_response(error, scope["path"])(scope, receive, self._send)
            return
        if not self._streams:
            raise error  # the answer has no end, which makes the server close the connection
        await self._send({"type": "http.response.body", "body": error_event(error, scope["path"]), "more_body": False})


def _refusal(error: BaseException) -> ApiError | None:
    """What a client is told of a failure between front and replica; None where it is no such failure."""
    if isinstance(error, RayActorError):
        return _LOST
    if isinstance(error, (BackPressureError, DeploymentUnavailableError)):
        return _NONE
    if isinstance(error, RayError):
        return ApiError(500, "the replica failed; its log says how", code="internal_error")
    return None


async def _lifespan(receive: Receive, send: Send) -> None:
    with suppress(asyncio.CancelledError):
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
