"""Products of prompt rows: each by the family that the launch plan names, whatever the number of rows.

Packed weights go straight to the tensor cores: float32 matrices by float_gemm.py, on Hopper all others by gemm.py. The
rest is expanded and multiplied by cuBLAS (dense.py). Must not know of layers or batches.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.experts import prefill as grouped
from engine.cuda.launch_plan.families import Family, Phase
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_products import DeviceProduct, DeviceProjection
from engine.cuda.load.device_weights import DeviceFfn, DeviceMoe
from engine.cuda.matrix.dense import DenseProduct
from engine.cuda.matrix.dense_plan import padded
from engine.cuda.matrix.float_gemm import multiply
from engine.cuda.matrix.gemm import Gemms, Operand, make_operand
from engine.cuda.matrix.gemm_plan import operand_bytes
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.folding import Hidden, columns_of, folded, rows_of
from engine.gguf.types import GGMLType


class PromptProducts:
    """Multiplies prompt rows; implements step.ops.Products.

    Results are the same bits for a row whatever the other rows are: on Hopper always, elsewhere if deterministic.

    Args:
        plan: of the model.
        buffers: of prompts; inputs of products are converted in `operand`.

    Attributes:
        gemms: products of gemm.cu, which decode steps of many rows use as well.
    """

    def __init__(self, plan: LaunchPlan, buffers: Activations) -> None:
        self._buffers = buffers
        self.gemms = Gemms(plan.gemm_types, plan.gemm_activations)
        self._dense = DenseProduct(fixed_rows=plan.fixed_rows) if plan.dense else None

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        return self._dense.n_bytes if self._dense else 0

    def product(
        self,
        projection: DeviceProjection,
        x: Hidden,
        out: DeviceArray,
        *,
        norm: DeviceNorm | None = None,
        add: bool = False,
        ready: bool = False,
        then: DeviceNorm | None = None,
    ) -> None:
        """See Products.product; x may also be what gated() returned. Prompts leave no operands."""
        assert not ready and then is None
        operand: DeviceArray | Operand | None = x if isinstance(x, Operand) else None
        for part in projection.parts:
            column = part.plan.column
            target = out[:, column : column + part.group.width]
            if part.plan.families.prompt is Family.PREFILL_GEMM:
                operand = operand if isinstance(operand, Operand) else self._operand(rows_of(x), norm)
                self.gemms.plain(part.group, operand, target, bias=part.bias, add=add, alpha=part.alpha)
            elif part.plan.families.prompt is Family.FLOAT_GEMM:
                weight, eps = folded(norm)
                multiply(
                    part.group, rows_of(x), target, norm=weight, eps=eps, bias=part.bias, alpha=part.alpha, add=add
                )
            else:
                operand = self._expanded(part, rows_of(x), operand, target, norm, add=add)

    def _expanded(
        self,
        part: DeviceProduct,
        x: DeviceArray,
        left: DeviceArray | Operand | None,
        out: DeviceArray,
        norm: DeviceNorm | None,
        *,
        add: bool,
    ) -> DeviceArray | None:
        """A part by cuBLAS. left: norm(x) as an earlier part has left it; returns what this one leaves."""
        assert self._dense is not None
        column, operand = 0, None if isinstance(left, Operand) else left
        for matrix in part.group.matrices:
            wide = matrix.type is GGMLType.F32
            if operand is None or (operand.itemsize == 4) != wide:
                operand = self._plain(x, wide, norm)
            target = out[:, column : column + matrix.rows]
            self._dense(matrix, operand, target, rows=len(x), alpha=part.alpha, add=add)
            column += matrix.rows
        if part.bias is not None:
            row_ops.add_bias(out, part.bias, part.alpha)
        return operand

    def gated(
        self,
        ffn: DeviceFfn,
        x: DeviceArray,
        *,
        norm: DeviceNorm | None = None,
        ready: bool = False,
        leaves: bool = False,
    ) -> Hidden:
        """See Products.gated; an Operand where the down projection can take one, in the memory of `gate`."""
        paired, n, width = ffn.paired, len(x), ffn.plan.width
        assert paired is not None
        assert not ready and not leaves
        h = columns_of(self._buffers.gate, n, width)
        if paired.plan.families.prompt is Family.PREFILL_GEMM:
            product, operand = self.gemms.gated[ffn.plan.activation], self._operand(x, norm)
            room = self._hidden_room(n, width) if ffn.plan.chains(n, Phase.PROMPT) else h
            return product.gated(paired.group, operand, room) or h
        (matrix,), up = paired.group.matrices, columns_of(self._buffers.up, n, width)
        if paired.plan.families.prompt is Family.FLOAT_GEMM:
            weight, eps = folded(norm)
            multiply(paired.group, x, h, norm=weight, eps=eps, second=up)
        else:
            assert self._dense is not None
            self._dense(matrix, self._plain(x, matrix.type is GGMLType.F32, norm), h, rows=n, second=up)
        for half, bias in ((h, ffn.gate_bias), (up, ffn.up_bias)):
            if bias is not None:
                row_ops.add_bias(half, bias, 1.0)
        row_ops.gate(h, up, ffn.plan.activation)
        return h

    def grouped(
        self,
        moe: DeviceMoe,
        x: DeviceArray,
        scores: DeviceArray,
        room: DeviceArray | None,
        out: DeviceArray,
        norm: DeviceNorm | None,
        positions: DeviceArray | None = None,
    ) -> None:
        """The family EXPERTS_GROUPED, for prompts and decode steps; see experts.prefill.run."""
        assert moe.grouped is not None and room is not None
        gemm, (weight, eps) = self.gemms.gated[moe.plan.expert.activation], folded(norm)
        grouped.run(moe.grouped, gemm, x, scores, room, out=out, norm=weight, eps=eps, positions=positions)

    def _operand(self, x: DeviceArray, norm: DeviceNorm | None) -> Operand:
        weight, eps = folded(norm)
        assert self._buffers.operand is not None
        return make_operand(x, self._buffers.operand, norm=weight, eps=eps)

    def _hidden_room(self, n: int, width: int) -> DeviceArray:
        import cupy

        return self._buffers.gate.reshape(-1).view(cupy.uint8)[: operand_bytes(n, width)]

    def _plain(self, x: DeviceArray, wide: bool, norm: DeviceNorm | None) -> DeviceArray:
        """norm(x) row-major, filled up to the rows that the dense product multiplies at a time."""
        import cupy

        dtype = cupy.dtype(cupy.float32 if wide else cupy.float16)
        n, k = x.shape
        assert self._dense is not None
        rows = padded(n) if self._dense.fixed_rows else n
        assert self._buffers.operand is not None
        operand = self._buffers.operand[: rows * k * dtype.itemsize].view(dtype).reshape(rows, k)
        row_ops.normalize(x, operand, *folded(norm))
        return operand
