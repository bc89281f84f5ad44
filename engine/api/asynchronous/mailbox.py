"""Mailboxes that carry the news of requests from the thread of a model to event loops.

A mailbox wakes its loop at once for the first and the last chunk of a request. Between them, while the loop is busy
with earlier ones, chunks collect and arrive together, so that a fast model does not spend its time on waking the loop.
Knows neither models nor who steps them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.request import StreamChunk

SHORTEST_PAUSE = 0.01
LONGEST_PAUSE = 0.05
"""Seconds between two deliveries to a loop."""
MOST_WAIT = 0.001
"""Seconds that wait() waits at most: some times what a loop needs for a chunk, where it has nothing else to do."""
LOOP_SHARE = 0.06
"""The part of the time that a loop may spend on delivered chunks before deliveries become rarer. The thread of the
model waits for the interpreter lock while the loop's thread runs."""


@dataclass(frozen=True)
class PromptProgress:
    """How much of a prompt has been read.

    Attributes:
        total: tokens of the prompt.
        cached: those that the cache held.
        done: those that are in the cache now; `cached` in the first news.
        seconds: since the prompt's first step was planned, about.
    """

    total: int
    cached: int
    done: int
    seconds: float


News = StreamChunk | PromptProgress | Exception
"""What a request is told: the next chunk, or what ended it; before them, on request, how its prompt is read."""


class Receiver(Protocol):
    """Takes the news of one request, in the thread of its event loop."""

    def receive(self, news: News) -> None:
        """The next news."""

    def wake(self) -> None:
        """Called once after the news of one delivery."""


class Mailbox:
    """News on their way to the receivers of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._news: deque[tuple[Receiver, News]] = deque()
        self._due = False  # a delivery is scheduled
        self._timer: asyncio.TimerHandle | None = None  # of that delivery, where it is not to be made at once
        self._busy = 0.0  # processor seconds of the loop's thread at the last delivery
        self._delivered = 0.0
        self._passed_on = threading.Event()

    def post(self, news: Sequence[tuple[Receiver, News]], *, at_once: bool = True) -> None:
        """Send news; called by the thread of the model.

        Args:
            news: each with its receiver.
            at_once: do not wait for the next delivery, where one is scheduled.
        """
        self._passed_on.clear()
        self._news.extend(news)
        if at_once or not self._due:
            self._due = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: no task is left to read
                self._news.clear()

    def wait(self) -> None:
        """Until the tasks of the loop have handled what was posted last, or for MOST_WAIT; called as post() is.

        Without it the model's next step competes with them for processors and for the interpreter lock.
        """
        self._passed_on.wait(MOST_WAIT)

    def _deliver(self) -> None:
        """Hand out what there is; then again after a pause, until there is nothing."""
        if self._timer is not None:
            if not self._news:  # an earlier delivery took what this one was scheduled for
                return
            self._timer.cancel()
        receivers: dict[int, Receiver] = {}
        while self._news:
            receiver, news = self._news.popleft()
            receiver.receive(news)
            receivers[id(receiver)] = receiver
        for receiver in receivers.values():
            receiver.wake()
        if receivers:
            self._loop.call_soon(self._passed_on.set)  # behind the tasks that were just woken
            self._timer = self._loop.call_later(self._pause(), self._after_pause)
            return
        self._due = False
        if self._news and not self._due:  # posted between the look and the line above
            self._due = True
            self._loop.call_soon(self._deliver)

    def _after_pause(self) -> None:
        self._timer = None
        self._deliver()

    def _pause(self) -> float:
        """Seconds to the next delivery: as long as the loop needs to spend no more than its share on them."""
        now, busy = time.perf_counter(), time.thread_time()
        spent, passed = busy - self._busy, now - self._delivered
        self._busy, self._delivered = busy, now
        if passed > 2 * LONGEST_PAUSE:  # the first one after a rest
            return SHORTEST_PAUSE
        return min(max(spent / LOOP_SHARE, SHORTEST_PAUSE), LONGEST_PAUSE)
