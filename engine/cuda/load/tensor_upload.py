"""Brings tensors to the GPU, packed, and makes of them the products that the launch plan lists.

Must not know of layers or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import numpy.typing as npt

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.formats.layouts import kept_as
from engine.cuda.formats.repack import PackedMatrix, repack
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.products import Matrix, Product, Projection
from engine.cuda.load.device_products import DeviceProduct, DeviceProjection
from engine.cuda.load.tensor_index import TensorIndex
from engine.cuda.matrix.decode_gemm import DecodeGemm
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.matrix.matvec import MatVec
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm, DeviceRope
from engine.gguf.quants import dequantize
from engine.model.config import NormKind, RopeStyle
from engine.model.rope import RopeTable
from engine.model.weights import (
    Linear,
    Norm,
    Weight,
)


class TensorUploader:
    """Uploads tensors on one stream.

    Args:
        stream: a CuPy stream.
        progress: called with the bytes uploaded so far.
    """

    def __init__(self, stream: Stream, progress: Callable[[int], None]) -> None:
        self._stream = stream
        self._progress = progress
        self._done = 0
        self._plan: LaunchPlan
        self._tensors: TensorIndex
        self._packed: dict[str, PackedMatrix] = {}
        self._vectors: dict[int, tuple[DeviceArray, np.ndarray]] = {}

    # ---- tensors ---------------------------------------------------------------------------------------------

    def norm(self, norm: Norm | None) -> DeviceNorm | None:
        """A norm on the device; None stays None."""
        if norm is None:
            return None
        weight, bias = (None if one is None else self.vector(one).reshape(-1) for one in (norm.weight, norm.bias))
        return DeviceNorm(norm.kind is NormKind.LAYER, norm.epsilon, weight, bias)

    @overload
    def vector(self, values: None, dtype: npt.DTypeLike = np.float32) -> None: ...
    @overload
    def vector(self, values: np.ndarray, dtype: npt.DTypeLike = np.float32) -> DeviceArray: ...
    def vector(self, values: np.ndarray | None, dtype: npt.DTypeLike = np.float32) -> DeviceArray | None:
        """A small array on the device; None stays None."""
        import cupy

        if values is None:
            return None
        key = id(values)
        if key not in self._vectors:
            self._vectors[key] = (cupy.asarray(np.ascontiguousarray(values, dtype=dtype)), values)
        return self._vectors[key][0]

    def matrix(self, weight: Weight, partner: Weight | None = None, behind: Sequence[Weight] = ()) -> PackedMatrix:
        """One matrix or one below the other all of a stack, packed; the same tensors are packed once.

        behind: what launch_plan.products.Matrix names behind the weight and its partner.
        """
        sources = (weight,) if partner is None else (weight, partner)
        key = " ".join(one.name for one in (*sources, *behind))
        if key not in self._packed:
            rows = sum(one.rows * one.columns for one in behind[:1]) // weight.columns + int(np.prod(weight.shape[:-1]))
            raw = [self._raw(one, behind[i : i + 1]) for i, one in enumerate(sources)]
            self._packed[key] = repack(
                raw[0], kept_as(weight.type), rows, weight.columns, partner=raw[-1] if partner else None,
                stream=self._stream,
            )  # fmt: skip
        return self._packed[key]

    def _raw(self, weight: Weight, behind: Sequence[Weight] = ()) -> DeviceArray:
        """Bytes of a tensor on the device, and behind them those of another in rows of as many columns."""
        import cupy

        pieces = [np.ascontiguousarray(weight.raw), *(_in_rows(more, weight.columns) for more in behind)]
        pieces = [piece.reshape(-1) for piece in pieces]
        if kept_as(weight.type) is not weight.type:
            pieces = [dequantize(piece, weight.type).view(np.uint8) for piece in pieces]
        device: DeviceArray = cupy.empty(sum(piece.nbytes for piece in pieces), cupy.uint8)
        start = 0
        for piece in pieces:
            device[start : start + piece.nbytes].set(piece, stream=self._stream)
            start += piece.nbytes
        self._done += weight.n_bytes + sum(more.n_bytes for more in behind)
        self._progress(self._done)
        return device

    def _rope(self, rope: RopeTable | None) -> DeviceRope:
        if rope is None:
            return NO_ROPE
        halves = rope.style is RopeStyle.NEOX
        return DeviceRope(int(rope.n_rot), halves, self.vector(rope.inv_freq, np.float64), rope.magnitude)

    # ---- products --------------------------------------------------------------------------------------------

    def projection(self, plan: Projection, expert: int | None = None) -> DeviceProjection:
        """The launches of a projection; of a stack, those of one expert."""
        parts = tuple(self.product(part, expert) for part in plan.parts)
        return DeviceProjection(parts, plan.width, plan.columns)

    def product(self, plan: Product, expert: int | None = None) -> DeviceProduct:
        """One launch; of a stack, that of one expert."""
        linears = [self._tensors.linear(one.tensor, expert) for one in plan.matrices]
        partner = plan.matrices[0].partner
        up = None if partner is None else self._tensors.linear(partner, expert).weight
        behind = [self._behind(one) for one in plan.matrices]
        matrices = [self.matrix(linear.weight, up, more) for linear, more in zip(linears, behind, strict=True)]
        alpha = plan.alpha if expert is None else linears[0].scale
        return self._over(plan, matrices, self._bias(linears), alpha)

    def _stack(self, plan: Matrix) -> PackedMatrix:
        partner = None if plan.partner is None else self._tensors.stack(plan.partner).weight
        return self.matrix(self._tensors.stack(plan.tensor).weight, partner, self._behind(plan))

    def _behind(self, plan: Matrix) -> list[Weight]:
        return [self._tensors.linear(name).weight for name in plan.behind]

    def _over(
        self, plan: Product, matrices: Sequence[PackedMatrix], bias: DeviceArray | None, alpha: float
    ) -> DeviceProduct:
        """The launchers that the plan asks for."""
        used = plan.families.used
        matvec = MatVec(matrices) if Family.MATVEC in used else None
        gemm = None
        if Family.DECODE_GEMM in used:
            gemm = DecodeGemm(matrices, self._plan.card.multiprocessors, plan.cut)
        return DeviceProduct(plan, matvec or MatrixGroup(matrices), matvec, gemm, bias, alpha)

    @staticmethod
    def _bias(group: Sequence[Linear]) -> DeviceArray | None:
        if all(linear.bias is None for linear in group):
            return None
        pieces = [
            np.zeros(linear.weight.rows, np.float32) if linear.bias is None else linear.bias / np.float32(linear.scale)
            for linear in group
        ]
        import cupy

        bias: DeviceArray = cupy.asarray(np.concatenate(pieces).astype(np.float32))
        return bias

    def _view(
        self, plan: Projection, stack: PackedMatrix, index: int, count: int, bias: DeviceArray | None = None
    ) -> DeviceProjection:
        """One matrix of a stack that is packed as a whole, as a projection."""
        (part,) = plan.parts
        product = self._over(part, [part_of(stack, index, count)], bias, 1.0)
        return DeviceProjection((product,), plan.width, plan.columns)


def _in_rows(weight: Weight, columns: int) -> np.ndarray:
    """Bytes of a matrix cut into matrices of so many columns, one below the other."""
    beside = weight.columns // columns
    return np.ascontiguousarray(weight.raw.reshape(weight.rows, beside, -1).swapaxes(0, 1))


def part_of(matrix: PackedMatrix, index: int, count: int) -> PackedMatrix:
    """One of `count` equal stacks of rows, each of whole tiles, as a view."""
    n_bytes = matrix.data.nbytes // count
    data = matrix.data[index * n_bytes : (index + 1) * n_bytes]
    return replace(matrix, rows=matrix.rows // count, data=data)
