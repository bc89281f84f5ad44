"""Kinds of distance between two positions, each with a learned bias per head (T5; Raffel et al. 2020)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FARTHEST = 128
"""Distances from this one on are of one kind."""


def relative_buckets(distance: npt.NDArray[np.int64], n_buckets: int) -> npt.NDArray[np.int64]:
    """The kind of each distance key - query, 0 to n_buckets - 1, for queries that see both directions.

    Half of the kinds are for later keys. Of each half the first half is for one distance each; the others divide
    the distances up to FARTHEST evenly on a logarithmic scale, computed in float32 as T5 was trained.
    """
    half = n_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    scale = (half - exact) / math.log(FARTHEST / exact)
    steps = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)).astype(np.float64) * scale
    far = np.minimum(np.floor((exact + steps).astype(np.float32)).astype(np.int64), half - 1)
    return np.where(size < exact, size, far) + np.where(distance > 0, half, 0)
