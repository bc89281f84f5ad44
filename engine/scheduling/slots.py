"""The slots of a runner: which are free, and when sequences should move to lower ones. Knows no requests."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Collection, Sequence

from engine.config import step_sizes
from engine.request import ActiveSequence

PATIENCE = 16
"""Plans in a row in which sequences occupy more than twice the slots they need before they move together."""


class Slots:
    """Slots 0 to n - 1; the lowest free one is taken first.

    Attributes:
        n: how many there are.
        free: those that no sequence holds, as a heap.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.free = list(range(n))
        self._sizes = step_sizes(n)
        self._scattered = 0  # plans in a row in which fewer slots would have done

    def take(self) -> int:
        """The lowest free slot, which is not free any more."""
        return heapq.heappop(self.free)

    def give(self, slot: int) -> None:
        """A slot is free again."""
        heapq.heappush(self.free, slot)

    def recover(self, taken: Collection[int]) -> None:
        """Make `free` all slots but these."""
        self.free = [slot for slot in range(self.n) if slot not in taken]

    def to_move(self, running: Sequence[ActiveSequence]) -> list[ActiveSequence]:
        """Of the running sequences those that should move to lower slots now; to be asked once for each plan.

        The highest slot in use decides how many rows a step has (config.step_sizes).
        """
        needed = self._sizes[bisect_left(self._sizes, len(running))]
        beyond = [sequence for sequence in running if sequence.slot >= needed]
        self._scattered = self._scattered + 1 if beyond else 0
        return beyond if self._scattered > PATIENCE else []
