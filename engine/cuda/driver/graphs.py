"""Launches that come again: made one by one, or replayed from a graph that was captured when they came before.

A graph has the addresses and sizes of its launches, so they belong to a key that decides both. A key that is new is
launched by hand, which loads its kernels: opening a model does not pay for what is never used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

_REMEMBERED = 256
"""Keys whose occurrences are counted; of more, those unused for longest are forgotten."""


class Graphs:
    """Launches by key.

    Args:
        stream: the stream of all launches.
        eager: never capture.
        after: times that a key is launched by hand before it is captured, which takes about as long as two of them.
        most: graphs that are kept; of more, those unused for longest are dropped.
    """

    def __init__(self, stream: Any, *, eager: bool, after: int = 1, most: int = 64) -> None:
        self._stream = stream
        self._eager = eager
        self._after = after
        self._most = most
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()

    def launch(self, key: Hashable, run: Callable[[], None]) -> None:
        """What run() launches on the stream; it allocates nothing, and does the same whenever the key is the same."""
        graph = self._graphs.get(key)
        if graph is None:
            seen = self._seen.get(key, 0)
            if self._eager or seen < self._after:
                run()
                self._count(key, seen + 1)
                return
            graph = self._graphs[key] = self._capture(run)
            if len(self._graphs) > self._most:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph.launch(self._stream)

    def _count(self, key: Hashable, times: int) -> None:
        self._seen[key] = times
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _capture(self, run: Callable[[], None]) -> Any:
        self._stream.begin_capture()
        try:
            run()
        finally:
            graph = self._stream.end_capture()
        return graph
