"""Ctrl-C held back while the engine writes its books. Knows signals, nothing of requests.

Python raises KeyboardInterrupt between any two instructions, also between taking a page and noting who has it.
Interactive users interrupt a generation and go on with the same model, so the books must be whole afterwards.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object]


class Deferral:
    """While this context lasts, an interrupt of the main thread waits for its end, or for check().

    Contexts may lie inside one another; the outermost counts. On other threads, and where a program has given Ctrl-C no
    handler in Python, nothing is done: nothing is raised there.

    Attributes:
        lifted: interrupts are let through meanwhile. To be set and reset by plain assignment inside the context, right
            before and after a `try` whose `finally` resets it: no interrupt can fall between.
    """

    def __init__(self) -> None:
        self.lifted = False
        self._outer: list[bool] = []  # what `lifted` was outside each context
        self._pending = False
        self._before: Handler = signal.default_int_handler

    def __enter__(self) -> Deferral:
        if threading.current_thread() is threading.main_thread():
            if not self._outer:
                self._install()
            self._outer.append(self.lifted)
            self.lifted = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._outer or threading.current_thread() is not threading.main_thread():
            return
        self.lifted = self._outer[-1]
        del self._outer[-1]
        if self._outer:
            return
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self._before)
        if not isinstance(error, KeyboardInterrupt):
            self.check()

    def check(self) -> None:
        """Let an interrupt through that has been waiting."""
        if self._pending and threading.current_thread() is threading.main_thread():
            self._pending = False
            self._before(signal.SIGINT, None)

    def _install(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        self._pending = False
        if callable(handler) and handler != self._note:
            self._before = handler
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.lifted:
            self._before(number, frame)
        else:
            self._pending = True


deferral = Deferral()
"""The one of this process, as there is one main thread."""
