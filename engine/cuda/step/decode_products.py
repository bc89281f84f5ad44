"""Products of a decode step: each by the family that the launch plan names for the number of rows.

Must not know of layers or batches.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.families import Family, Phase
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_products import DeviceProduct, DeviceProjection
from engine.cuda.load.device_weights import DeviceFfn
from engine.cuda.matrix.float_gemm import multiply
from engine.cuda.matrix.gemm import Gemms, Operand, make_operand
from engine.cuda.matrix.gemm_plan import operand_bytes
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.folding import Hidden, Left, columns_of, folded, rows_of


class DecodeProducts:
    """Multiplies rows of a decode step; implements step.ops.Products.

    Args:
        buffers: of decode steps; products of many rows use batch_operand and stream_operand.
        n_rows: rows of the step.
        gemms: products of STEP_GEMM.
    """

    def __init__(self, buffers: Activations, n_rows: int, gemms: Gemms) -> None:
        self._buffers = buffers
        self._n = n_rows
        self._gemms = gemms

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
        """See Products.product; x may also be what gated() returned."""
        operand = x if isinstance(x, Operand) else None
        for part in projection.parts:
            column = part.plan.column
            target = out[:, column : column + part.group.width]
            if part.plan.family_for(self._n) is Family.STEP_GEMM:
                assert not ready and then is None
                operand = operand or self._operand(rows_of(x), norm)
                gemm = self._gemms.plain
                gemm(part.group, operand, target, bias=part.bias, add=add, alpha=part.alpha, step=True)
            else:
                left = self._buffers.stream_operand if ready else None
                if isinstance(x, Left):
                    left = self._buffers.batch_operand
                self._launch(part, rows_of(x), target, KernelActivation.NONE, norm, add=add, left=left, then=then)

    def gated(
        self,
        ffn: DeviceFfn,
        x: DeviceArray,
        *,
        norm: DeviceNorm | None = None,
        ready: bool = False,
        leaves: bool = False,
    ) -> Hidden:
        """See Products.gated; an Operand where the down projection takes one, in the memory of `gate`."""
        assert ffn.paired is not None
        h = columns_of(self._buffers.gate, self._n, ffn.plan.width)
        if ffn.paired.plan.family_for(self._n) is Family.STEP_GEMM:
            assert not ready and not leaves
            room = self._hidden_room(ffn.plan.width) if ffn.plan.chains(self._n, Phase.DECODE) else h
            gemm = self._gemms.gated[ffn.plan.activation]
            return gemm.gated(ffn.paired.group, self._operand(x, norm), room, step=True) or h
        left = self._buffers.stream_operand if ready else None
        assert left is not None or not leaves, "the operand that is read would be written over"
        self._launch(ffn.paired, x, h, ffn.plan.activation, norm, add=False, left=left, then=None, leaves=leaves)
        return Left(h) if leaves else h

    def _operand(self, x: DeviceArray, norm: DeviceNorm | None) -> Operand:
        weight, eps = folded(norm)
        assert self._buffers.batch_operand is not None
        return make_operand(x, self._buffers.batch_operand, norm=weight, eps=eps)

    def _hidden_room(self, width: int) -> DeviceArray:
        import cupy

        return self._buffers.gate.reshape(-1).view(cupy.uint8)[: operand_bytes(self._n, width)]

    def _launch(
        self,
        part: DeviceProduct,
        x: DeviceArray,
        out: DeviceArray,
        activation: KernelActivation,
        norm: DeviceNorm | None,
        *,
        add: bool,
        left: DeviceArray | None,
        then: DeviceNorm | None,
        leaves: bool = False,
    ) -> None:
        """left: where an earlier launch has left the operand, if one has. leaves: in batch_operand, by halves."""
        weight, eps = folded(norm)
        if part.plan.family_for(self._n) is Family.MATVEC:
            assert part.matvec is not None
            part.matvec(
                x,
                out,
                norm=weight,
                eps=eps,
                bias=part.bias,
                activation=activation,
                add=add,
                alpha=part.alpha,
                operand=self._buffers.batch_operand,
            )
            return
        if part.plan.family_for(self._n) is Family.FLOAT_GEMM:
            assert left is None and then is None
            multiply(part.group, x, out, norm=weight, eps=eps, bias=part.bias, alpha=part.alpha, add=add)
            return
        assert part.decode_gemm is not None
        buffers = self._buffers
        operand = buffers.batch_operand if left is None else left
        assert operand is not None
        halves = None
        if leaves:
            assert buffers.batch_operand is not None and buffers.operand_words is not None
            halves = buffers.batch_operand, buffers.operand_words
        part.decode_gemm(
            x,
            out,
            operand,
            norm=weight,
            eps=eps,
            bias=part.bias,
            activation=activation,
            add=add,
            alpha=part.alpha,
            ready=left is not None,
            emitted=None if then is None else (then.weight, buffers.stream_operand),
            halves=halves,
        )
