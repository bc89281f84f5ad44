"""Arrays whose rows are copied, saved and loaded together: pages of the cache, and recurrent states.

All copies are launches of one stream, in order with the steps. Must not know what the rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.cuda.driver.launch import launch
from engine.cuda.driver.staging import Mapped, Staging, addresses, kernel

_ALIGNMENT = 16
"""Bytes that the copying kernel moves at a time."""


class SavedRows:
    """Rows of several arrays in pinned host memory.

    Args:
        row_bytes: size of a row of each array.
        n_rows: how many.

    Attributes:
        n_rows: how many.
        n_bytes: host memory taken.
        arrays: uint64, device address of the rows of each array.
    """

    def __init__(self, row_bytes: Sequence[int], n_rows: int) -> None:
        self.n_rows = n_rows
        each = [-(-n_rows * size // _ALIGNMENT) * _ALIGNMENT for size in row_bytes]
        self.n_bytes = sum(each)
        # Not cleared: what an earlier owner of this memory has launched may still be reading or writing it.
        self._memory = Mapped((max(self.n_bytes, 4) // 4,), np.uint32, clear=False)
        starts = np.cumsum([0, *each[:-1]]) if each else np.zeros(0, np.int64)
        self.arrays = int(self._memory.device.data.ptr) + starts.astype(np.uint64)


class RowStore:
    """Device arrays whose first axis counts the same rows.

    Args:
        arrays: C-contiguous; the size of a row is a multiple of 4 bytes. None at all is allowed: then nothing is done.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        import cupy

        self.row_bytes = [int(array.nbytes) // len(array) for array in arrays]
        self._addresses = cupy.asarray(addresses(arrays))
        self._sizes = cupy.asarray(np.asarray(self.row_bytes, np.int64))

    def copy(self, pairs: Sequence[tuple[int, int]], staging: Staging) -> None:
        """Copies rows (source, target) of all arrays; a target must not be a source or occur twice."""
        self._move(self._addresses, self._addresses, pairs, staging)

    def save(self, rows: Sequence[int], staging: Staging) -> SavedRows:
        """Rows as host memory, in stream order: they may be overwritten by whatever is launched next."""
        saved = SavedRows(self.row_bytes, len(rows))
        self._move(self._addresses, saved.arrays, [(row, i) for i, row in enumerate(rows)], staging)
        return saved

    def load(self, saved: SavedRows, rows: Sequence[int], staging: Staging) -> None:
        """The opposite, into any rows; as many as were saved."""
        assert len(rows) == saved.n_rows
        self._move(saved.arrays, self._addresses, list(enumerate(rows)), staging)

    def _move(self, sources: Any, targets: Any, pairs: Sequence[tuple[int, int]], staging: Staging) -> None:
        if not pairs or not self.row_bytes:
            return
        staging.rewind()
        placed = [staging.place(one) if isinstance(one, np.ndarray) else one for one in (sources, targets)]
        given = staging.place(np.asarray(pairs, np.int32).reshape(-1, 2))
        staging.send()
        args = (*placed, self._sizes, given)
        launch(kernel("copy_pages"), (len(pairs), len(self.row_bytes)), 256, args, pdl=False)
