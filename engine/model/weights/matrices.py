"""Packed matrices and normalizations: what the weights of every part are made of.

A matrix stays as the file stores it, a mapped view; nothing here expands it. Small vectors are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.gguf.quants import GGMLType
from engine.model.config import NormKind

Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix (rows, columns), or a stack of them (E, rows, columns), packed in blocks along the columns.

    Attributes:
        name: the tensor's name in the file (a slice keeps it and appends its range).
        type: block format of every row.
        shape: in elements, outermost first.
        raw: uint8 (..., rows, bytes per row), read-only view of the mapped file; of rows at equal distances
            (runs, rows of a run, bytes per row).
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    raw: Uint8Array

    @property
    def rows(self) -> int:
        """Rows of one matrix: outputs of the product."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """Columns of one matrix: inputs of the product."""
        return self.shape[-1]

    @property
    def n_bytes(self) -> int:
        """Packed size."""
        return self.raw.nbytes

    def slice_rows(self, start: int, stop: int) -> Weight:
        """Rows start:stop of a matrix, or of every matrix of a stack, as a view."""
        shape = (*self.shape[:-2], stop - start, self.columns)
        return Weight(f"{self.name}[{start}:{stop}]", self.type, shape, self.raw[..., start:stop, :])

    def every(self, first: int, run: int, step: int, label: str) -> Weight:
        """`run` rows from `first` on of every `step` rows of a matrix, as a view."""
        by_step = self.raw.reshape(-1, step, self.raw.shape[-1])[:, first : first + run]
        shape = (len(by_step) * run, self.columns)
        return Weight(f"{self.name}[{label}]", self.type, shape, by_step)

    def repeated(self, times: int) -> Weight:
        """Each row of a matrix so many times in turn, as a view."""
        raw = np.broadcast_to(self.raw[:, None], (self.rows, times, self.raw.shape[-1]))
        return Weight(f"{self.name}[{times} times]", self.type, (self.rows * times, self.columns), raw)

    def expert(self, index: int) -> Weight:
        """One matrix of a stack, as a view."""
        assert len(self.shape) == 3
        return Weight(f"{self.name}[{index}]", self.type, self.shape[1:], self.raw[index])


@dataclass(frozen=True, eq=False)
class Linear:
    """y = scale · (W x) + bias; W is (N, M), bias (N,) float32 or None."""

    weight: Weight
    bias: Float32Array | None = None
    scale: float = 1.0

    def slice_rows(self, start: int, stop: int) -> Linear:
        """The projection to outputs start:stop, as a view."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight.slice_rows(start, stop), bias, self.scale)

    def every(self, first: int, run: int, step: int, label: str) -> Linear:
        """The projection to `run` outputs from `first` on of every `step`, as a view."""
        bias = None if self.bias is None else self.bias.reshape(-1, step)[:, first : first + run].reshape(-1)
        return Linear(self.weight.every(first, run, step, label), bias, self.scale)

    def repeated(self, times: int) -> Linear:
        """Each output so many times in turn, as a view."""
        bias = None if self.bias is None else np.repeat(self.bias, times)
        return Linear(self.weight.repeated(times), bias, self.scale)


@dataclass(frozen=True, eq=False)
class ExpertLinear:
    """E projections in one stack: yₑ = scaleₑ · (Wₑ x) + biasₑ; W (E, N, M), scale (E,), bias (E, N) or None."""

    weight: Weight
    bias: Float32Array | None = None
    scale: Float32Array | None = None

    def __post_init__(self) -> None:
        # Views are made once: a decode step asks for several of them per layer.
        linears = []
        for index in range(self.weight.shape[0]):
            bias = None if self.bias is None else self.bias[index]
            scale = 1.0 if self.scale is None else float(self.scale[index])
            linears.append(Linear(self.weight.expert(index), bias, scale))
        object.__setattr__(self, "_linears", tuple(linears))

    def slice_rows(self, start: int, stop: int) -> ExpertLinear:
        """The projections to outputs start:stop of every expert, as a view."""
        bias = None if self.bias is None else self.bias[:, start:stop]
        return ExpertLinear(self.weight.slice_rows(start, stop), bias, self.scale)

    def expert(self, index: int) -> Linear:
        """The projection of one expert."""
        linears: tuple[Linear, ...] = self._linears  # type: ignore[attr-defined]
        return linears[index]


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalization of the last axis, then its weight and bias, float32 (D,) or None for none.

    Weight and bias (heads, Hd) act on x (T, heads, Hd): every head has its own.
    """

    kind: NormKind
    epsilon: float
    weight: Float32Array | None
    bias: Float32Array | None = None
