"""One replica: the server of one machine without its socket, whose requests come over Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any

from starlette.types import Message

from engine.cluster.conversation import Conversation
from engine.errors import DeviceError
from engine.serve.app import make_app
from engine.serve.models.model_store import ModelSpec
from engine.serve.serving import Serving
from engine.serve.settings import ServeSettings

OPENED = "opened"
"""What a replica tells routers: the names of the models that it has open."""


class Replica:
    """A deployment of Ray Serve.

    Args:
        specs: the models; the only one is opened at once, others on first use.
        settings: of the server; the front has checked keys, and Ray writes the requests' times, before they come here.

    Raises:
        ApiError: the only model cannot be opened.
    """

    async def __init__(self, specs: Sequence[ModelSpec], settings: ServeSettings) -> None:  # type: ignore[misc]
        self._serving = Serving(specs, replace(settings, api_keys=(), cors_origins=()), owns_process=True)
        self._app = make_app(self._serving)
        self._alive = AsyncExitStack()
        await self._alive.enter_async_context(self._serving.alive())
        if len(specs) == 1:
            store = self._serving.store
            store.release(await store.acquire(None))

    async def respond(
        self, scope: dict[str, Any], body: bytes, *, conversation: Conversation | None = None
    ) -> AsyncIterator[list[Message]]:
        """The messages of an answer as ASGI has them, those that are there at a time together.

        Ending the iteration early, or cancelling it, is the client's going away.

        Args:
            scope: of the request.
            body: all of it.
            conversation: for the router.
        """
        gone, ready, messages = asyncio.Event(), asyncio.Event(), list[Message]()
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.append(message)
            ready.set()

        answering = asyncio.ensure_future(self._app(scope, receive, send))
        answering.add_done_callback(lambda _: ready.set())
        try:
            while not answering.done() or messages:
                await ready.wait()
                ready.clear()
                if messages:
                    some, messages[:] = list(messages), []
                    yield some
            answering.result()  # raises what the application did not turn into an answer
        finally:
            gone.set()
            if not answering.done():
                answering.cancel()
                with suppress(asyncio.CancelledError):
                    await answering

    async def metrics(self) -> bytes:
        """This replica's metrics as Prometheus reads them."""
        return self._serving.metrics.text()

    async def drain(self) -> int:
        """Take no new requests; returns how many still run."""
        self._serving.draining = True
        return sum(model.users for model in self._serving.store.models)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray at intervals, for the router."""
        return {OPENED: self._serving.store.opened}

    async def check_health(self) -> None:
        """Called by Ray at intervals; a replica that raises is replaced.

        Raises:
            DeviceError: the device of a model has failed.
        """
        for model in self._serving.store.models:
            failure: DeviceError | None = None if model.llm is None else model.llm.failure
            if failure is not None:
                raise failure

    async def __del__(self) -> None:
        """Called by Ray before the replica ends."""
        if hasattr(self, "_alive"):
            await self._alive.aclose()
