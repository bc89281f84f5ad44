"""Linear maps of one input as the launches they take. Must not know what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.cuda.matrix.matvec import MatVec


@dataclass(frozen=True, eq=False)
class Part:
    """Matrices that one launch multiplies with one input: out = alpha * (W x + bias), at `column` of the output.

    Attributes:
        matvec: the launch.
        bias: float32 (width,) on the device, already divided by alpha; None for none.
        alpha: factor of the result.
        column: first output column.
    """

    matvec: MatVec
    bias: Any
    alpha: float
    column: int


@dataclass(frozen=True, eq=False)
class Projection:
    """One or several linear maps of the same input, outputs side by side.

    Attributes:
        parts: launches.
        width: output columns.
        columns: input columns.
    """

    parts: tuple[Part, ...]
    width: int
    columns: int
