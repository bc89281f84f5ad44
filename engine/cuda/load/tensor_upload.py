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
from engine.cuda.launch_plan.products import Product, Projection
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

    def matrix(self, weight: Weight, partner: Weight | None = None) -> PackedMatrix:
        """One matrix or one below the other all of a stack, packed; the same tensor is packed once."""
        key = weight.name if partner is None else f"{weight.name} {partner.name}"
        if key not in self._packed:
            rows = int(np.prod(weight.shape[:-1]))
            other = None if partner is None else self._raw(partner)
            self._packed[key] = repack(
                self._raw(weight), kept_as(weight.type), rows, weight.columns, partner=other, stream=self._stream
            )
        return self._packed[key]

    def _raw(self, weight: Weight) -> DeviceArray:
        import cupy

        raw = np.ascontiguousarray(weight.raw).reshape(-1)
        if kept_as(weight.type) is not weight.type:
            raw = dequantize(raw, weight.type).view(np.uint8)
        device: DeviceArray = cupy.empty(raw.nbytes, cupy.uint8)
        device.set(raw, stream=self._stream)
        self._done += weight.raw.nbytes
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
        matrices = [self.matrix(linear.weight, up) for linear in linears]
        alpha = plan.alpha if expert is None else linears[0].scale
        return self._over(plan, matrices, self._bias(linears), alpha)

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


def part_of(matrix: PackedMatrix, index: int, count: int) -> PackedMatrix:
    """One of `count` equal stacks of rows, each of whole tiles, as a view."""
    n_bytes = matrix.data.nbytes // count
    data = matrix.data[index * n_bytes : (index + 1) * n_bytes]
    return replace(matrix, rows=matrix.rows // count, data=data)
