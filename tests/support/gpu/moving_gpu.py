"""A pretended card whose stream does its work only when the host waits, and which really moves what the host sends.

Kernels that bring news from the host and that copy pages are carried out; all others are left out. So what reaches
device arrays is known after any call, and memory that the host overwrites too early is found.
"""

import ctypes
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from engine.cuda.driver.staging import RECORD
from tests.support.gpu.fake_cupy import FakeGpu


@dataclass
class MovingGpu(FakeGpu):
    """See the module."""

    queue: list = field(default_factory=list)

    def ran(self, name, grid, args):
        self.launches.clear()
        if name == "scatter":
            self.queue.append((self._scatter, grid, (*args, *map(np.array, args))))
        elif name == "copy_pages":
            self.queue.append((self._copy_pages, grid, args))

    def call(self, name, *args):
        super().call(name, *args)
        if name == "memcpy":
            self.queue.append((lambda grid, to, at, size: ctypes.memmove(to, at, size), None, args))
        if name == "record":
            args[0].after = self.queue[-1:]
        elif name == "synchronize" and args:  # an event
            self.finish(getattr(args[0], "after", []))
        elif name in ("synchronize", "memcpy"):  # copies from and to pageable memory wait
            self.finish(self.queue[-1:])

    def finish(self, last=None):
        """Everything launched so far runs, or what was launched up to `last`."""
        last = self.queue[-1:] if last is None else last
        while any(one is last[0] for one in self.queue if last):
            run, grid, args = self.queue.pop(0)
            run(grid, *args)

    def _scatter(self, grid, records, data, *launched_with):
        found = np.asarray(records).view(RECORD)[: grid[0]]
        used = int((found["first"] + found["count"]).max())
        intact = [found.tobytes(), data[:used].tobytes()]
        assert intact == [launched_with[0].view(RECORD)[: grid[0]].tobytes(), launched_with[1][:used].tobytes()], (
            "the host wrote where a kernel has still to read"
        )
        ends = sorted((int(to), int(to) + 4 * int(count)) for to, _, count in found)
        apart = all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert apart, "two records of a send have the same target: their order is not defined"
        for to, first, count in found:
            self.named(int(to))  # an address of the card
            ctypes.memmove(int(to), data.data.ptr + 4 * int(first), 4 * int(count))

    def _copy_pages(self, grid, sources, targets, sizes, pairs):
        for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            for one, other in pairs.tolist():
                to, at = target + other * size, source + one * size
                assert self.named(to)
                assert self.named(at)
                ctypes.memmove(to, at, size)
