"""Which of a text's vectors its embedding is made of. Knows no devices; the rest is engine/runner/pooling.py."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.model.config import Pooling


def pooled(text: npt.NDArray[np.float32], pooling: Pooling) -> npt.NDArray[np.float32]:
    """Of a text's vectors (T, D), T at least 1, their MEAN, the CLS or the LAST one as (1, D); with NONE all (T, D)."""
    if pooling is Pooling.NONE:
        return text
    if pooling is Pooling.MEAN:
        return np.asarray(text.mean(axis=0, keepdims=True, dtype=np.float64), dtype=np.float32)
    return np.asarray(text[:1] if pooling is Pooling.CLS else text[-1:])
