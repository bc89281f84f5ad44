"""Arrays that begin at borders of cache lines or of huge pages."""

from typing import Any

import numpy as np
import numpy.typing as npt

LINE = 64
"""Bytes of a cache line: a load of a vector that crosses into a second line costs twice as much."""

HUGE = 2 << 20
"""Bytes of a huge page, which Linux gives to large arrays of numpy where it can; elsewhere an alignment like any."""


def aligned_empty(*shape: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of any content at a multiple of LINE."""
    return _cut(np.empty, shape, dtype, LINE)


def aligned_zeros(*shape: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of zeros at a multiple of LINE, of HUGE for large ones; takes memory when written to."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return _cut(np.zeros, shape, dtype, HUGE if n_bytes >= 2 * HUGE else LINE)


def _cut(make: Any, shape: tuple[int, ...], dtype: npt.DTypeLike, step: int) -> npt.NDArray[Any]:
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    room: npt.NDArray[np.uint8] = make(n_bytes + step, dtype=np.uint8)
    start = -room.__array_interface__["data"][0] % step
    return room[start : start + n_bytes].view(dtype).reshape(shape)
