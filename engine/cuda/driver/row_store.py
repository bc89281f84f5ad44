"""Arrays whose rows are copied, saved and loaded together: pages of the cache, and recurrent states.

All copies are launches of one stream, in order with the steps. Must not know what the rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.failure import is_out_of_memory
from engine.cuda.driver.launch import launch
from engine.cuda.driver.staging import Mapped, Staging, addresses, kernel

_ALIGNMENT = 16
"""Bytes that the copying kernel moves at a time."""


class SavedRows:
    """Rows of several arrays in host memory: pinned, which kernels reach, or pageable where no more of that is left.

    Args:
        row_bytes: size of a row of each array.
        n_rows: how many.

    Attributes:
        n_rows: how many.
        n_bytes: host memory taken.
        arrays: uint64, address of the rows of each array. pinned: whether it is one that kernels reach.

    Raises:
        MemoryError: there is no host memory of either kind.
    """

    def __init__(self, row_bytes: Sequence[int], n_rows: int) -> None:
        self.n_rows = n_rows
        each = [-(-n_rows * size // _ALIGNMENT) * _ALIGNMENT for size in row_bytes]
        self.n_bytes = sum(each)
        # Not cleared: what an earlier owner of this memory has launched may still be reading or writing it.
        self._memory: Mapped | np.ndarray
        words = max(self.n_bytes, 4) // 4
        try:
            self._memory = Mapped((words,), np.uint32, clear=False)
            first = int(self._memory.device.data.ptr)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._memory = np.empty(words, np.uint32)
            first = int(self._memory.ctypes.data)
        self.pinned = isinstance(self._memory, Mapped)
        starts = np.cumsum([0, *each[:-1]]) if each else np.zeros(0, np.int64)
        self.arrays = first + starts.astype(np.uint64)


class RowStore:
    """Device arrays whose first axis counts the same rows.

    Args:
        arrays: C-contiguous; the size of a row is a multiple of 4 bytes. None at all is allowed: then nothing is done.
    """

    def __init__(self, arrays: Sequence[DeviceArray]) -> None:
        import cupy

        self.row_bytes = [int(array.nbytes) // len(array) for array in arrays]
        self._bases = addresses(arrays)
        self._addresses = cupy.asarray(self._bases)
        self._sizes = cupy.asarray(np.asarray(self.row_bytes, np.int64))

    def copy(self, pairs: Sequence[tuple[int, int]], staging: Staging) -> None:
        """Copies rows (source, target) of all arrays; a target must not be a source or occur twice."""
        self._move(self._addresses, self._addresses, pairs, staging)

    def save(self, rows: Sequence[int], staging: Staging) -> SavedRows:
        """Rows as host memory, in stream order: they may be overwritten by whatever is launched next."""
        saved = SavedRows(self.row_bytes, len(rows))
        pairs = [(row, i) for i, row in enumerate(rows)]
        if saved.pinned:
            self._move(self._addresses, saved.arrays, pairs, staging)
        else:
            self._move_each(self._bases, saved.arrays, pairs, "memcpyDeviceToHost")
        return saved

    def load(self, saved: SavedRows, rows: Sequence[int], staging: Staging) -> None:
        """The opposite, into any rows; as many as were saved."""
        assert len(rows) == saved.n_rows
        if saved.pinned:
            self._move(saved.arrays, self._addresses, list(enumerate(rows)), staging)
        else:
            self._move_each(saved.arrays, self._bases, list(enumerate(rows)), "memcpyHostToDevice")

    def _move_each(
        self,
        sources: npt.NDArray[np.uint64],
        targets: npt.NDArray[np.uint64],
        pairs: Sequence[tuple[int, int]],
        kind: str,
    ) -> None:
        """As _move(), by a copy of the driver for each row of each array: from and to pageable memory it waits."""
        import cupy

        runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
        for first, second, size in zip(sources.tolist(), targets.tolist(), self.row_bytes, strict=True):
            for source, target in pairs:
                at, to = first + source * size, second + target * size
                runtime.memcpyAsync(to, at, size, getattr(runtime, kind), stream)

    def _move(
        self,
        sources: DeviceArray | npt.NDArray[np.uint64],
        targets: DeviceArray | npt.NDArray[np.uint64],
        pairs: Sequence[tuple[int, int]],
        staging: Staging,
    ) -> None:
        if not pairs or not self.row_bytes:
            return
        staging.rewind()
        placed = [staging.place(one) if isinstance(one, np.ndarray) else one for one in (sources, targets)]
        given = staging.place(np.asarray(pairs, np.int32).reshape(-1, 2))
        staging.send()
        args = (*placed, self._sizes, given)
        launch(kernel("copy_pages"), (len(pairs), len(self.row_bytes)), 256, args, pdl=False)
