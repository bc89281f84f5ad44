"""Launches that come again: made one by one, or replayed from a graph that was captured when they came before.

A graph has the addresses and sizes of its launches, so they belong to a key that decides both. A key that is new is
launched by hand, which loads its kernels: opening a model does not pay for what is never used. Where memory does not
suffice for a graph, launches run by hand, with the same results, until it does.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from engine.cuda.driver.arrays import Graph, Stream
from engine.cuda.driver.failure import is_out_of_memory

log = logging.getLogger("engine")

PATIENCE = 64
"""Launches of a key by hand after its graph found no memory; a capture takes the host about as long as one of them."""

_REMEMBERED = 256
"""Keys whose occurrences are counted; of more, those unused for longest are forgotten."""


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


class Graphs:
    """Launches by key.

    Args:
        stream: the stream of all launches.
        eager: never capture.
        after: times that a key is launched by hand before it is captured, which takes about as long as two of them.
        most: graphs that are kept; of more, those unused for longest are dropped.
    """

    def __init__(self, stream: Stream, *, eager: bool, after: int = 1, most: int = 64) -> None:
        self._stream = stream
        self._eager = eager
        self._after = after
        self._most = most
        self._left: OrderedDict[Hashable, int] = OrderedDict()  # launches by hand until a key is captured
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._told = False

    def launch(self, key: Hashable, run: Callable[[], None], *, again: bool = True) -> None:
        """What run() launches on the stream.

        It allocates nothing and does the same whenever the key is the same.

        Args:
            key: what decides the launches.
            run: makes them.
            again: run again after it failed, it does the same too, as what moves a step on is launched last, or apart.
                Otherwise the caller repeats more than this.
        """
        if self._eager or not self._replay(key, run):
            self._launch_each(run, again)
            self._count(key)

    def _replay(self, key: Hashable, run: Callable[[], None]) -> bool:
        """From the graph; False where there is none yet, or no memory for one."""
        if key not in self._graphs and self._left.get(key, 1) > 0:
            return False
        try:
            if key not in self._graphs:
                self._graphs[key] = capture(self._stream, run)
                if len(self._graphs) > self._most:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            self._graphs[key].launch(self._stream)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._graphs.pop(key, None)
            self._left[key] = PATIENCE + 1
            if not self._told:
                log.warning("GPU memory is full: steps run slower until there is some (%s)", error)
            self._told = True
            return False
        return True

    def _launch_each(self, run: Callable[[], None], again: bool) -> None:
        """One by one; where there is no memory to load a kernel, graphs of other keys give theirs."""
        try:
            run()
        except Exception as error:
            if not (self._graphs and is_out_of_memory(error)):
                raise
            self._graphs.clear()
            if not again:
                raise
            run()

    def _count(self, key: Hashable) -> None:
        self._left[key] = self._left.get(key, self._after) - 1
        self._left.move_to_end(key)
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
