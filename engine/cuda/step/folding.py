"""Small things that bricks share: what a product applies itself, and views of buffers."""

from __future__ import annotations

from typing import Any

from engine.cuda.rows.parts import DeviceNorm


def folded(norm: DeviceNorm | None) -> tuple[Any, float]:
    """Weight and epsilon of a norm that a product applies itself."""
    assert norm is None or norm.folds
    return (None, 0.0) if norm is None else (norm.weight, norm.epsilon)


def columns_of(buffer: Any, n: int, width: int) -> Any:
    """The first n * width floats of a buffer as (n, width), contiguous whatever the buffer's own width."""
    return buffer.reshape(-1)[: n * width].reshape(n, width)
