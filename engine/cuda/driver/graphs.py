"""One decode step on the stream: launched kernel by kernel, or replayed from a graph captured per number of rows.

A number of rows that is new runs by hand once, which loads its kernels, and is captured the second time: opening a
model does not pay for sizes that are never used. Where memory does not suffice for a graph, steps of that size run by
hand, with the same results, until it does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from engine.cuda.driver.arrays import Graph, Stream
from engine.cuda.driver.failure import is_out_of_memory

log = logging.getLogger("engine")

PATIENCE = 64
"""Steps of a size that run by hand after its graph found no memory; a capture takes the host about as long as one."""


def capture(stream: Stream, run: Callable[[], Any]) -> Graph:
    """What run() launches on a stream, as a graph; nothing of it runs now."""
    try:
        stream.begin_capture()
        run()
        return stream.end_capture()
    finally:
        end_capture(stream)


def end_capture(stream: Stream) -> None:
    """Ends a capture that an exception cut short, or all that follows would be captured instead of run."""
    try:
        capturing = bool(stream.is_capturing())
    except RuntimeError:  # how CuPy says that an error has made the capture invalid
        capturing = True
    if capturing:
        with suppress(Exception):  # it says once more what made the capture invalid
            stream.end_capture()


class StepGraphs:
    """Launches decode steps.

    Args:
        run: run(n) launches every kernel of a step over rows 0..n-1 on the current stream; it allocates nothing. Run
            again after it failed, it does the same: what moves a step on is launched last.
        stream: that stream.
        eager: never capture.
    """

    def __init__(self, run: Callable[[int], None], stream: Stream, *, eager: bool) -> None:
        self._run = run
        self._stream = stream
        self._eager = eager
        self._loaded: set[int] = set()
        self._graphs: dict[int, Graph] = {}
        self._waits: dict[int, int] = {}  # by number of rows: steps until a graph is tried again
        self._told = False

    def launch(self, n: int) -> None:
        """One step over rows 0..n-1."""
        if self._eager or n not in self._loaded or not self._replay(n):
            self._launch_each(n)
            self._loaded.add(n)

    def _replay(self, n: int) -> bool:
        """One step from its graph; False where there is no memory for one."""
        waits = self._waits.get(n, 0)
        if waits:
            self._waits[n] = waits - 1
            return False
        try:
            if n not in self._graphs:
                self._graphs[n] = capture(self._stream, lambda: self._run(n))
            self._graphs[n].launch(self._stream)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._graphs.pop(n, None)
            self._waits[n] = PATIENCE
            if not self._told:
                log.warning("GPU memory is full: decode steps of %d rows run slower until there is some (%s)", n, error)
            self._told = True
            return False
        return True

    def _launch_each(self, n: int) -> None:
        """One step kernel by kernel; where there is no memory to load one, graphs of other sizes give theirs."""
        try:
            self._run(n)
        except Exception as error:
            if not (self._graphs and is_out_of_memory(error)):
                raise
            self._graphs.clear()
            self._run(n)
