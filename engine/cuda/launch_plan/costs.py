"""What decode steps of different numbers of rows cost beside each other, and how many rows a step should have.

Must not know of models or requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

_DENSE = {
    1: 1.5, 8: 2.1, 16: 2.3, 32: 2.9, 64: 3.6, 96: 5.1, 128: 5.9, 192: 8.0, 256: 9.5, 384: 14.0, 512: 17.8, 768: 26.0,
    1024: 34.9,
}  # fmt: skip
_MIXTURE = {
    1: 1.2, 4: 2.9, 16: 5.2, 32: 6.3, 64: 7.3, 96: 8.5, 128: 9.3, 160: 10.5, 192: 11.1, 256: 12.6, 320: 14.9, 384: 16.2,
    512: 19.9, 640: 22.8, 768: 24.8, 1024: 33.4,
}  # fmt: skip
"""Rows and milliseconds of a step, 8B and 30B-A3B Q4_K_M on an H200. Other models of a kind have similar ratios."""
_FILLED, _FILLING = 256, 0.018
"""Rows of the largest step of a mixture in which rows share experts, and milliseconds that a row takes less which only
fills it: it has no experts."""

Cost = Callable[[int], float]


def cost_of(sizes: Sequence[int], *, mixture: bool, deterministic: bool = False) -> Cost:
    """Gives cost(n): what a decode step over n rows costs beside others.

    Args:
        sizes: numbers of rows that steps may have, ascending; a step is filled up to one of them.
        mixture: whether the model has experts, which rows that only fill a step do not have. Up to 64 rows they are
            all that counts.
        deterministic: rows are multiplied 64 at a time.
    """
    table = _MIXTURE if mixture else _DENSE

    def of_size(size: int) -> float:
        return float(np.interp(size, list(table), list(table.values())))

    costs = []
    for size in sizes:
        whole, rest = divmod(size, 64) if deterministic else (0, size)
        costs.append(whole * of_size(64) + (of_size(rest) if rest else 0.0))

    def cost(n: int) -> float:
        if mixture and n <= 64:
            return of_size(n)
        at = min(bisect_left(sizes, n), len(costs) - 1)
        shared = mixture and not deterministic and n <= sizes[at] <= _FILLED
        return costs[at] - (_FILLING * (sizes[at] - n) if shared else 0.0)

    return cost


def rows_of_turns(sizes: Sequence[int], most: int, cost: Cost) -> tuple[int, ...]:
    """By number of rows that could run, 0 to `most`: how many a step takes, so that most rows are done in a second.

    All of them, or as many as an earlier size where the step that holds them all costs more than its rows are worth:
    then rows take turns, and throughput never falls when rows are added.
    """
    found, best, fastest = [0], 0, 0.0
    for n in range(1, most + 1):
        speed = n / cost(n)
        if speed >= fastest:
            fastest, best = speed, n
        found.append(best)
    return tuple(found)
