"""Socket, signals and the order of beginning and end: uvicorn around the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from engine.errors import EngineError
from engine.serve.app import make_app
from engine.serve.errors import ApiError
from engine.serve.http_protocol import Connection
from engine.serve.serving import Serving

log = logging.getLogger("engine.serve")


_LAST = 5.0
"""Seconds that cancelled requests have to leave their places."""


@contextlib.contextmanager
def _cancellations_untold() -> Iterator[None]:
    """uvicorn takes every request that is cancelled for a failure of the application, and logs its traceback."""

    def told(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)

    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(told)
    try:
        yield
    finally:
        logger.removeFilter(told)


class Server(uvicorn.Server):
    """uvicorn's server, which here ends with status 0 after SIGTERM and SIGINT, and drains for a bounded time.

    Args:
        serving: what it serves.
        ending: called with the number of running requests when they are waited for.
    """

    def __init__(self, serving: Serving, ending: Callable[[int], None]) -> None:
        settings = serving.settings
        connection = type("LimitedConnection", (Connection,), {"timeout": settings.read_timeout})
        super().__init__(
            uvicorn.Config(
                make_app(serving),
                host=settings.host,
                port=settings.port,
                http=connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=settings.max_connections,
                timeout_keep_alive=max(int(settings.keep_alive), 1),
                timeout_graceful_shutdown=max(int(settings.grace), 1),
            )
        )
        self._serving = serving
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests, as long as the settings say, and close everything."""
        running = list(self.server_state.tasks)
        if running and not self.force_exit:
            self._ending(len(running))
        with _cancellations_untold():
            await super().shutdown(sockets)
            if self.force_exit:  # uvicorn leaves requests and models as they are
                for task in running:
                    task.cancel()
            if running:
                await asyncio.wait(running, timeout=_LAST)
            if self.force_exit:
                await self.lifespan.shutdown()

    def begin_end(self) -> None:
        """Take no new requests and end when the running ones have."""
        self._serving.draining = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C begin the end; a second Ctrl-C does not wait for running requests."""
        if threading.current_thread() is not threading.main_thread():  # signals are not for us
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            if self._serving.draining and number == signal.SIGINT:
                self.force_exit = True
            self.begin_end()

        before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


async def serve(
    serving: Serving,
    sockets: list[socket.socket],
    ready: Callable[[], None],
    stop: asyncio.Event | None = None,
    ending: Callable[[int], None] = lambda _: None,
) -> str | None:
    """Serve until a signal comes.

    Args:
        serving: what to serve.
        sockets: bound sockets.
        stop: does what SIGTERM does, for servers outside the main thread.
        ready: called when the model of a server with one model is open, else when the server answers.
        ending: called with the number of running requests when the end begins and they are waited for.

    Returns:
        None after an orderly end; what was wrong where the only model cannot be opened.
    """
    server = Server(serving, ending)
    running = asyncio.ensure_future(server.serve(sockets=sockets))
    problem: str | None = None

    async def open_first() -> None:
        nonlocal problem
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        if len(serving.store.models) == 1:
            try:
                serving.store.release(await serving.store.acquire(None))
            except Exception as error:
                problem = str(error) if isinstance(error, (ApiError, EngineError, OSError)) else repr(error)
                server.should_exit = True
                return
        ready()

    async def watch_stop(event: asyncio.Event) -> None:
        await event.wait()
        server.begin_end()

    beside = [asyncio.ensure_future(open_first())]
    if stop is not None:
        beside.append(asyncio.ensure_future(watch_stop(stop)))
    try:
        await running
    finally:
        for task in beside:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return problem


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets for an address, one for each family that it has.

    Raises:
        OSError: the address is in use, or is none of this machine's.
    """
    sockets: list[socket.socket] = []
    for one in host.split(","):
        infos = socket.getaddrinfo(one.strip(), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            found.bind(address)
        except OSError as error:
            found.close()
            for other in sockets:
                other.close()
            raise OSError(error.errno, f"{host}:{port} cannot be used: {error.strerror}") from None
        sockets.append(found)
    return sockets
