"""A lock that cannot stay locked: a call holds it, and a call that has ended holds nothing.

An asynchronous exception (a signal handler that raises, PyThreadState_SetAsyncExc) can arrive between any two
instructions: between acquiring a lock and the `try` whose `finally` would release it, or inside that `finally`. After a
fork the thread that would release it does not exist. So a Turn does not rely on the release alone: a call that waits
for longer than WAIT_SECONDS looks whether the holding call is still on the stack of its thread.
"""

from __future__ import annotations

import sys
from _thread import LockType, allocate_lock
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import Any
from weakref import ref

from engine.errors import EngineError

WAIT_SECONDS = 0.1
"""After so long a waiting call looks whether the call that it waits for still runs."""

VARIABLE = "hold"


class Hold:
    """The right of one call to something, for as long as the call runs.

    It must be made by the call itself and kept in a local variable named `hold`: that is how other threads see on the
    stack whether the call still runs.

    Args:
        owner: an object that keeps the right as well, as long as it exists; for rights that outlast the call.

    Attributes:
        thread: the thread of the call.
        released: the call has given up its right.
        next: holds of calls that asked for the turn after this one; the first of them has it.
    """

    __slots__ = ("next", "owner", "released", "thread")

    def __init__(self, owner: Any = None) -> None:
        self.thread = get_ident()
        self.released = False
        self.next: list[Hold] = []
        self.owner = None if owner is None else ref(owner)

    def is_running(self) -> bool:
        """Whether the call that made it still runs, or its owner is alive."""
        frame = sys._current_frames().get(self.thread)
        if self.owner is not None and self.thread != get_ident():
            return frame is not None and self.owner() is not None
        while frame is not None:
            if VARIABLE in frame.f_code.co_varnames and frame.f_locals.get(VARIABLE) is self:
                return True
            frame = frame.f_back
        return False


class Turn:
    """What one call has at a time. Calls that use wait() come before those that use take().

    Attributes:
        bells: locks that sleeping calls wait for.
    """

    def __init__(self) -> None:
        self._last = Hold()
        self._last.released = True
        self._line: deque[Hold] = deque()  # calls inside wait()
        self.bells: deque[LockType] = deque()

    def take(self, hold: Hold, *, check: bool = False) -> bool:
        """Try to have the turn; False if another call has it or waits for it.

        Args:
            hold: a fresh one of the calling function, or one that was refused before.
            check: look whether those calls still run.
        """
        return not (self._line and self._line_runs(check)) and self._take(hold, check)

    def wait(self, hold: Hold) -> None:
        """Wait for the turn.

        Raises:
            EngineError: the holder is further down on this thread's own stack.
        """
        if not self._line and self._take(hold, check=False):
            return
        self._line.append(hold)
        try:
            check = False
            while not self._take(hold, check):
                check = not self.sleep(self._is_free)
        finally:
            with suppress(ValueError):
                self._line.remove(hold)

    def release(self, hold: Hold) -> None:
        """Give the turn to the next call; one that did not have it only gives up wanting it."""
        hold.released = True
        if self.bells and self._newest() is hold:
            self.ring()

    def ring(self) -> None:
        """Wake all sleeping calls."""
        if self.bells:
            with suppress(IndexError):  # another thread rings as well
                while True:
                    self.bells.popleft().release()

    def sleep(self, over: Callable[[], bool]) -> bool:
        """Wait for the next release(), unless over() is true already; False if it did not come in WAIT_SECONDS.

        Raises:
            EngineError: the turn is held further down on this thread's own stack, and would never be released.
        """
        if self.is_held_here():
            raise EngineError(
                "a model was used from inside one of its own steps, perhaps by a signal handler; let the handler set a "
                "flag, and use the model after the step"
            )
        bell = allocate_lock()
        bell.acquire()
        self.bells.append(bell)
        return over() or bell.acquire(timeout=WAIT_SECONDS)

    def is_held_here(self) -> bool:
        """Whether a call further down on this thread's stack has the turn."""
        last = self._newest()
        return not last.released and last.thread == get_ident() and last.is_running()

    def _take(self, hold: Hold, check: bool) -> bool:
        last = self._newest()
        if not last.released and (
            # A hold of this thread that is not on its stack is left over from a call that an exception cut short.
            last.is_running() if check or last.thread == get_ident() else True
        ):
            return False
        # Of several calls the one that appends first is next: list.append is atomic, and shows at once which call
        # holds.
        last.next.append(hold)
        if last.next[0] is not hold:
            return False
        self._last = hold
        return True

    def _newest(self) -> Hold:
        """The hold in force: an exception may have kept a call from noting its own as the last."""
        last = self._last
        while last.next:
            last = last.next[0]
        return last

    def is_open(self) -> bool:
        """Whether take() would succeed now, as far as calls have released what they held."""
        return not self._line and self._is_free()

    def _is_free(self) -> bool:
        return self._newest().released

    def _line_runs(self, check: bool) -> bool:
        """Whether a call waits in line; drops those that have ended."""
        me = get_ident()
        for waiting in tuple(self._line):
            if (check or waiting.thread == me) and not waiting.is_running():
                with suppress(ValueError):
                    self._line.remove(waiting)
        return bool(self._line)
