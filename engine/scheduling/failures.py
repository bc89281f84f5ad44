"""Tells a failure of the engine from an exception that something else raised into the thread that runs it.

A signal handler that raises, or PyThreadState_SetAsyncExc, can use any class, also ValueError. Such an exception ends
the call that it hit and nothing else, while a failure ends the requests it belongs to.
"""

from __future__ import annotations

import signal
import sys
from types import CodeType, TracebackType
from typing import Any

from engine.errors import EngineError

BELOW = frozenset({"engine", "numpy", "numba", "llvmlite", "cupy", "cupy_backends", "cuda"})
"""Packages whose code runs inside a step."""


class Failures:
    """Judges exceptions of one loop.

    An EngineError is a failure. Any other exception counts as raised from outside at first; when the next attempt is
    ended by the same exception at the same instruction, it is a failure. Never is one that came through a signal
    handler, nor one of a class that neither Python nor the engine nor the packages below it define.
    """

    def __init__(self) -> None:
        self._suspect: list[Any] = []

    def is_own(self, error: Exception) -> bool:
        """Whether an exception is a failure of what was being done."""
        trace = _trace(error.__traceback__)
        if _handlers().intersection(code for code, _ in trace):
            return False
        if isinstance(error, EngineError):
            return True
        if type(error).__module__.partition(".")[0] not in BELOW | sys.stdlib_module_names:
            return False
        suspect = [type(error), *trace]
        known, self._suspect = self._suspect == suspect, suspect
        return known

    def forget(self) -> None:
        """An attempt has succeeded."""
        self._suspect = []


def _trace(traceback: TracebackType | None) -> list[tuple[CodeType, int]]:
    """Code and instruction of every frame that an exception came through."""
    found = []
    while traceback is not None:
        found.append((traceback.tb_frame.f_code, traceback.tb_lasti))
        traceback = traceback.tb_next
    return found


def _handlers() -> set[CodeType]:
    """The code of all signal handlers that are written in Python."""
    found = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while hasattr(handler, "func"):  # functools.partial
            handler = handler.func
        for one in (handler, getattr(handler, "__call__", None)):  # noqa: B004 - objects with that method as well
            code = getattr(one, "__code__", None)
            if code is not None:
                found.add(code)
    return found
