"""Small things that bricks share: what a product applies itself, and views of buffers."""

from __future__ import annotations

from typing import NamedTuple

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.matrix.gemm import Operand
from engine.cuda.rows.parts import DeviceNorm


class Left(NamedTuple):
    """Rows whose operand of DECODE_GEMM is in Activations.batch_operand already."""

    x: DeviceArray


Hidden = DeviceArray | Operand | Left
"""Hidden vectors (T, F), or what attention gives: float32, or as the kernel of the next product reads them."""


class Read(NamedTuple):
    """What a product reads: rows (T, D), and the norm that it applies to them itself."""

    x: DeviceArray
    norm: DeviceNorm | None


Shared = tuple[Hidden, DeviceArray | None]
"""Hidden vectors of the expert that every row passes through, and its score (T, >= 1), in the first column, or None."""


def folded(norm: DeviceNorm | None) -> tuple[DeviceArray | None, float]:
    """Weight and epsilon of a norm that a product applies itself."""
    assert norm is None or norm.folds
    return (None, 0.0) if norm is None else (norm.weight, norm.epsilon)


def columns_of(buffer: DeviceArray, n: int, width: int) -> DeviceArray:
    """The first n * width floats of a buffer as (n, width), contiguous whatever the buffer's own width."""
    return buffer.reshape(-1)[: n * width].reshape(n, width)


def rows_of(x: Hidden) -> DeviceArray:
    """x, which is no operand yet: products of one projection read the same form of their input."""
    assert not isinstance(x, Operand)
    return x.x if isinstance(x, Left) else x
