"""Rows of activations as the blocked kernel reads them (kernels/blocked.py). Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.cpu.memory import array_address

if TYPE_CHECKING:
    from engine.cpu.threads import ThreadPool

Float32Array = npt.NDArray[np.float32]

COPY_TASK_FLOATS = 1 << 18
"""Least floats that a task copies."""


def spread_rows(x: Float32Array, columns: int, pool: ThreadPool) -> Float32Array:
    """Rows of x as the blocked kernel reads them: `columns` of them, behind the last one zeros, and spread."""
    if x.shape[1] == columns and x.strides[0] % 4096 >= 512:
        return x
    wide: Float32Array = pool.memory.empty(len(x), spread(4 * columns), dtype=np.uint8).view(np.float32)

    def copy(part: slice) -> None:
        wide[part, : x.shape[1]] = x[part]
        wide[part, x.shape[1] : columns] = 0

    _by_rows(copy, x, pool)
    return wide


def rounded_rows(
    x: Float32Array, columns: int, round_rows: Callable[..., None], pool: ThreadPool
) -> npt.NDArray[np.uint8]:
    """Rows of x as the blocked kernel of pairs reads them: rounded to BF16 by the kernel round_rows, and spread."""
    from engine.cpu.kernels.terms import PAIR_COLUMNS

    narrow: npt.NDArray[np.uint8] = pool.memory.empty(len(x), spread(2 * columns), dtype=np.uint8)
    source, row_bytes, target, out_bytes = array_address(x), x.strides[0], array_address(narrow), narrow.strides[0]

    def write(part: slice) -> None:
        low, high = part.start, part.stop
        places = source + low * row_bytes, row_bytes, columns // PAIR_COLUMNS, target + low * out_bytes, out_bytes
        round_rows(*places, high - low)

    _by_rows(write, x, pool)
    return narrow


def _by_rows(work: Callable[[slice], None], x: Float32Array, pool: ThreadPool) -> None:
    """Works on all rows of x, by as many threads as are worth it."""
    n_tasks = min(pool.threads, -(-x.size // COPY_TASK_FLOATS))
    pool.run(lambda index: work(slice(len(x) * index // n_tasks, len(x) * (index + 1) // n_tasks)), n_tasks)


def spread(n_bytes: int) -> int:
    """A row stride of at least n_bytes that maps neighbouring rows to different cache sets.

    Rows a multiple of 4 KB apart compete for the same few lines of the first-level cache: on an EPYC 7003 core,
    48 x 2048 times 128 tokens ran at 45 GFLOP/s with such rows and at 61 with these.
    """
    return n_bytes + (2048 + 64 - n_bytes) % 4096
