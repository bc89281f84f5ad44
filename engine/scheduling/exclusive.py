"""The runner for callers outside the step loop, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from engine.concurrency.turn import Hold, Turn
from engine.runner.protocol import Runner


class Exclusive(AbstractContextManager[Runner]):
    """The turn for as long as a `with` block lasts, at most as long as this object exists.

    Args:
        turn: of the loop.
        runner: what the block gets.
        begin: called with the turn; what it raises ends the block before it begins.
    """

    def __init__(self, turn: Turn, runner: Runner, begin: Callable[[], None]) -> None:
        self._turn = turn
        self._runner = runner
        self._begin = begin
        self._hold: Hold | None = None

    def __enter__(self) -> Runner:
        hold = self._hold = Hold(self)
        try:
            self._turn.wait(hold)
            self._begin()
            return self._runner
        except BaseException:
            self._turn.release(hold)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hold is not None
        self._turn.release(self._hold)
