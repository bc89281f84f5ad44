"""Ctrl-C that cannot get lost. Knows signals, no models.

Python raises KeyboardInterrupt wherever the main thread happens to be. Inside a finalizer or a callback from C it is
printed and forgotten, and inside the import of a C extension it becomes an ImportError. That happened to one in twelve
of the interrupts sent while kernels were loaded.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While this context lasts, an interrupt that Python swallows is raised by check(), or at the end at the latest."""

    def __init__(self) -> None:
        self._seen = False
        self._installed = False

    def __enter__(self) -> Interrupts:
        # Only where Ctrl-C means what it usually does: a process in the background may have been told to ignore it.
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            self._report = sys.unraisablehook
            sys.unraisablehook = self._unraisable
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._report
        if kind is None or issubclass(kind, Exception):
            self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if one arrived and got lost."""
        if self._seen:
            self._seen = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt

    def _unraisable(self, what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            self._report(what)
