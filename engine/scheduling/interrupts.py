"""Ctrl-C held back while the engine writes its books. Knows signals, nothing of requests.

Python raises KeyboardInterrupt between any two instructions, also between taking a page and noting who has it.
Interactive users interrupt a generation and go on with the same model, so the books must be whole afterwards.
"""

from __future__ import annotations

import threading

# What the module `signal` wraps in enums: with those a step would take 15 us longer.
from _signal import SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Callable
from threading import get_ident
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object]


class Deferral:
    """While this context lasts, an interrupt of the main thread waits for its end, or for check().

    Contexts may lie inside one another; the outermost counts. On other threads, and where a program has given Ctrl-C no
    handler in Python, nothing is done: nothing is raised there.

    Attributes:
        lifted: interrupts are let through meanwhile. To be set in a `try` and reset first thing in its `finally`, by
            plain assignment, as no interrupt falls between; and only where reaches_us() is true.
    """

    def __init__(self) -> None:
        self.lifted = False
        self._outer: list[bool] = []  # what `lifted` was outside each context
        self._pending = False
        self._before: Handler = default_int_handler

    def __enter__(self) -> Deferral:
        if self.reaches_us():
            if not self._outer:
                self._install()
            self._outer.append(self.lifted)
            self.lifted = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.reaches_us() or not self._outer:
            return
        self.lifted = self._outer[-1]
        del self._outer[-1]
        if self._outer:
            return
        if getsignal(SIGINT) == self._note:
            signal(SIGINT, self._before)
        if not isinstance(error, KeyboardInterrupt):
            self.check()

    def reaches_us(self) -> bool:
        """Whether interrupts are raised on this thread."""
        return get_ident() == threading.main_thread().ident

    def check(self) -> None:
        """Let an interrupt through that has been waiting."""
        if self._pending and self.reaches_us():
            self._pending = False
            self._before(SIGINT, None)

    def _install(self) -> None:
        handler = getsignal(SIGINT)
        self._pending = False
        if callable(handler) and handler != self._note:
            self._before = handler
            signal(SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.lifted:
            self._before(number, frame)
        else:
            self._pending = True


deferral = Deferral()
"""The one of this process, as there is one main thread."""
