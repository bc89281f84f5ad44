"""Launcher of pooling.cu: one vector of those of a text's tokens. Must not know of models."""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.model.config import Pooling

FILES = ("pooling.cu",)

_KINDS = {Pooling.MEAN: 0, Pooling.CLS: 1, Pooling.LAST: 2}


def pool_rows(x: DeviceArray, spans: DeviceArray, out: DeviceArray, pooling: Pooling) -> None:
    """out[n] (N, D) = the mean, the first or the last of the rows of text n in x (T, D).

    Args:
        x: float32, contiguous.
        spans: int32 (N, 2), contiguous: first row and number of rows of each text, at least one.
        out: float32, contiguous.
        pooling: MEAN, CLS or LAST.
    """
    assert x.flags.c_contiguous and out.flags.c_contiguous and spans.flags.c_contiguous
    assert spans.shape == (len(out), 2) and x.shape[1] == out.shape[1]
    columns = int(x.shape[1])
    grid = len(out), -(-columns // 256)
    launch(build(FILES).get("pool_rows"), grid, 256, (x, columns, spans, out, _KINDS[pooling]))
