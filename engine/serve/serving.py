"""What all endpoints share: settings, models, metrics, and whether the server is about to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from engine.concurrency.collector import leave_out_what_is_alive
from engine.serve.metrics import Metrics
from engine.serve.models.model_store import ModelSpec, ModelStore
from engine.serve.settings import ServeSettings


class Serving:
    """One server, without its socket.

    Args:
        specs: the models.
        settings: how it behaves.
        store: the models; None makes a store of the specs.
        owns_process: whether this process is nothing but the server: the garbage collector is set for it.

    Attributes:
        started: time.time() of its making.
        draining: whether the server is about to end and takes no new requests.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        settings: ServeSettings,
        store: ModelStore | None = None,
        *,
        owns_process: bool = False,
    ) -> None:
        self.settings = settings
        self.store = store or ModelStore(
            specs,
            max_models=settings.max_models,
            idle=settings.idle,
            settled=leave_out_what_is_alive if owns_process else lambda: None,
        )
        self.metrics = Metrics(self.store, settings.metrics_style)
        self.started = time.time()
        self.draining = False

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """The time in which requests are answered: idle models are closed in it, and all models at its end."""
        idle = asyncio.ensure_future(self.store.watch_idle())
        try:
            yield
        finally:
            idle.cancel()
            with suppress(asyncio.CancelledError):
                await idle
            await self.store.close()
