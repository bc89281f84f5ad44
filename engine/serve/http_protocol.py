"""uvicorn's HTTP/1.1 connection with what it lacks: time limits for heads and for answers, errors as JSON."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.serve.errors import ApiError, dump, error_object

log = logging.getLogger("engine.serve")

PROGRESS = 1 << 16
"""Bytes that a slow client must take within its time to get more of it."""


class Connection(H11Protocol):
    """A connection whose client must send the head of a request, and take what it is sent, within `timeout` seconds.

    The head of the first request counts from the connection's beginning, those of later ones from their first byte.
    An answer counts from when the system's buffers are full until the client has taken all that waits behind them;
    every 64 KiB that it takes give it the same time again.
    """

    timeout = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._taking_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that we are told of every byte that the system does not take
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._disarm()
        self._stop_watching()
        self._unset_keepalive_if_required()  # uvicorn keeps a reset connection until its timer ends
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._arm()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        self._watch_taking()

    def resume_writing(self) -> None:
        """The client has taken everything."""
        self._stop_watching()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; after the beginning of an answer there is nothing to say."""
        body = dump(error_object(ApiError(400, msg), ""))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        try:
            for part in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:
            pass
        self.transport.close()

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.timeout, self._too_slow)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _watch_taking(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._taking_timer = self.loop.call_later(self.timeout, self._check_taking, waiting)

    def _stop_watching(self) -> None:
        if self._taking_timer is not None:
            self._taking_timer.cancel()
            self._taking_timer = None

    def _check_taking(self, waiting: int) -> None:
        """Close the connection if the client has taken too little; that ends what makes its answer."""
        if self.transport.get_write_buffer_size() <= waiting - PROGRESS:
            self._watch_taking()
            return
        self._taking_timer = None
        log.info("a client does not take its answer; its connection is closed")
        self.transport.abort()
