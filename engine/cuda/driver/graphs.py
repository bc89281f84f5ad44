"""One decode step on the stream: launched kernel by kernel, or replayed from a graph captured per number of rows.

A number of rows that is new runs by hand once, which loads its kernels, and is captured the second time: opening a
model does not pay for sizes that are never used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StepGraphs:
    """Launches decode steps.

    Args:
        run: run(n) launches every kernel of a step over rows 0..n-1 on the current stream; it allocates nothing.
        stream: that stream.
        eager: never capture.
    """

    def __init__(self, run: Callable[[int], None], stream: Any, *, eager: bool) -> None:
        self._run = run
        self._stream = stream
        self._eager = eager
        self._loaded: set[int] = set()
        self._graphs: dict[int, Any] = {}

    def launch(self, n: int) -> None:
        """One step over rows 0..n-1."""
        if n not in self._loaded or self._eager:
            self._run(n)
            self._loaded.add(n)
            return
        if n not in self._graphs:
            self._graphs[n] = self._capture(n)
        self._graphs[n].launch(self._stream)

    def _capture(self, n: int) -> Any:
        self._stream.begin_capture()
        try:
            self._run(n)
        finally:
            graph = self._stream.end_capture()
        return graph
