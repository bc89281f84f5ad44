"""Answers of requests that generate: whole ones as JSON, streamed ones as server-sent events or lines of JSON.

In both cases a client that goes away ends its request: the answer's task is cancelled, and closing its Run frees the
pages before the next step.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.request import GenerationResult
from engine.serve.answers.long_work import off_loop, written
from engine.serve.errors import ApiError, as_api_error, dump, error_object
from engine.serve.run import Run
from engine.serve.serving import Serving

log = logging.getLogger("engine.serve")

T = TypeVar("T")
Events = AsyncIterator[bytes]

DONE = b"data: [DONE]\n\n"
LINES = "application/x-ndjson"
"""Media type of lines of JSON."""


def event(value: Any) -> bytes:
    """One event as OpenAI sends it."""
    return b"data: " + dump(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """One event with a name, as Anthropic and OpenAI's responses have them."""
    return b"event: " + name.encode() + b"\ndata: " + dump(value) + b"\n\n"


def error_event(error: ApiError, path: str) -> bytes:
    """An error as the last piece of a stream, in the words of the API to which the path belongs."""
    told = error_object(error, path)
    if path.startswith("/v1/messages"):
        return named_event("error", told)
    if path.startswith("/v1/responses"):
        return named_event("error", {"type": "error", **told["error"]})
    if path.startswith("/api/"):
        return dump(told) + b"\n"
    return event(told)


async def whole(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Await work(), unless the client goes away before it is done.

    Raises:
        ApiError: 499, which has no reader, where the client has gone.
    """
    working = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client has gone")
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(BaseException):
                await task


async def respond(
    request: Request,
    serving: Serving,
    run: Run,
    start: Callable[[], Awaitable[None]],
    value: Callable[[list[GenerationResult]], Any],
    events: Events | None = None,
    *,
    lines: bool = False,
) -> Response:
    """The answer of a run: an error as such where it never starts, then a stream or the whole.

    Args:
        request: of the client.
        serving: the server.
        run: not entered yet; closed at the end of the answer.
        start: queues the sequences, once the model is open.
        value: makes the whole answer of all results.
        events: a stream's events, which are asked for after start(); None: the whole answer is wanted.
        lines: the events are lines of JSON, not server-sent events.
    """

    async def begin() -> None:
        await run.open()
        await start()

    async def to_the_end() -> Response:
        await begin()
        results = await run.results()
        n = sum(one.stats.prompt_tokens + one.stats.output_tokens for one in results)
        return await off_loop(n, lambda: written(value(results)))

    streaming = False
    try:
        if events is None:
            return await whole(request, to_the_end)
        if run.is_ready:  # nothing to wait for that a client could tire of
            await begin()
        else:
            await whole(request, begin)
        streaming = True
    finally:
        if not streaming:
            run.close()
    path = request.url.path
    if lines:
        return LineStream(run, events, path)
    return EventStream(run, events, path, ping=serving.settings.ping)


async def gone(receive: Receive) -> None:
    """Wait until the client of a request, all of whose body was read, has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """Server-sent events of a run, which it closes at their end however that comes.

    One task beside the sending one waits for the client to leave, and a timer keeps a quiet stream open: the four tasks
    of sse-starlette would take as long as all other work of a request's beginning.

    Args:
        run: entered and started.
        events: each item is a complete event.
        path: of the request, for the form of an error.
        ping: seconds between comments while nothing else is sent.
    """

    def __init__(self, run: Run, events: Events, path: str, *, ping: float) -> None:
        self._run = run
        self._events = _guarded(run, events, path)
        self._comment = ServerSentEvent(comment="keep-alive", sep="\n").encode()
        self._quiet = True  # nothing was sent since the timer was set
        super().__init__(self._events, ping=ping, sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until their end or until the client has left."""
        sending, over, left = asyncio.current_task(), False, False
        assert sending is not None, "an application runs in a task"

        def leave(_: object) -> None:
            nonlocal left
            if not over:
                left = True
                sending.cancel()

        leaving = asyncio.ensure_future(gone(receive))
        leaving.add_done_callback(leave)
        pinging = asyncio.ensure_future(self._ping_when_quiet(send)) if self.ping_interval else None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._events:
                self._quiet = False
                await send({"type": "http.response.body", "body": data, "more_body": True})
            over = True
            if pinging is not None:
                pinging.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not left or sending.uncancel():  # others end the task
                raise
        finally:
            over = True
            leaving.cancel()
            if pinging is not None:
                pinging.cancel()
            await self._events.aclose()
            self._run.close()

    async def _ping_when_quiet(self, send: Send) -> None:
        """Send a comment after each interval without an event."""
        while True:
            self._quiet = True
            await asyncio.sleep(self.ping_interval)
            if self._quiet:
                await send({"type": "http.response.body", "body": self._comment, "more_body": True})


class LineStream(StreamingResponse):
    """Lines of JSON of a run, as Ollama's clients read them."""

    def __init__(self, run: Run, lines: Events, path: str) -> None:
        self._run = run
        super().__init__(_guarded(run, lines, path), media_type=LINES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()


async def _guarded(run: Run, events: Events, path: str) -> AsyncGenerator[bytes, None]:
    """The events; an error after the first one becomes an event of its own, as the status is sent already."""
    try:
        async for one in events:
            yield one
    except Exception as error:
        found = as_api_error(error)
        if found.code == "internal_error":
            log.error("a stream failed: %s", error, exc_info=error)
        yield error_event(found, path)
    finally:
        run.close()
