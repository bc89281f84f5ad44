"""Products of a decode step: each by the family that the launch plan names for the number of rows.

Must not know of layers or batches.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.families import Family
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import DeviceFfn, DeviceProduct, DeviceProjection
from engine.cuda.matrix.gemm import Operand
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.folding import Hidden, columns_of, folded


class DecodeProducts:
    """Multiplies rows of a decode step; implements step.ops.Products.

    Args:
        buffers: of decode steps; products of many rows use batch_operand and stream_operand.
        n_rows: rows of the step.
    """

    def __init__(self, buffers: Activations, n_rows: int) -> None:
        self._buffers = buffers
        self._n = n_rows

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
        """See Products.product; x are rows, as gated() returns them here."""
        assert not isinstance(x, Operand)
        for part in projection.parts:
            column = part.plan.column
            target = out[:, column : column + part.group.width]
            self._launch(part, x, target, KernelActivation.NONE, norm, add=add, ready=ready, then=then)

    def gated(
        self, ffn: DeviceFfn, x: DeviceArray, *, norm: DeviceNorm | None = None, ready: bool = False
    ) -> DeviceArray:
        """See Products.gated."""
        assert ffn.paired is not None
        h = columns_of(self._buffers.gate, self._n, ffn.plan.width)
        self._launch(ffn.paired, x, h, ffn.plan.activation, norm, add=False, ready=ready, then=None)
        return h

    def _launch(
        self,
        part: DeviceProduct,
        x: DeviceArray,
        out: DeviceArray,
        activation: KernelActivation,
        norm: DeviceNorm | None,
        *,
        add: bool,
        ready: bool,
        then: DeviceNorm | None,
    ) -> None:
        weight, eps = folded(norm)
        if part.plan.family_for(self._n) is Family.MATVEC:
            assert part.matvec is not None
            part.matvec(x, out, norm=weight, eps=eps, bias=part.bias, activation=activation, add=add, alpha=part.alpha)
            return
        assert part.decode_gemm is not None
        buffers = self._buffers
        operand = buffers.stream_operand if ready else buffers.batch_operand
        assert operand is not None
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
            ready=ready,
            emitted=None if then is None else (then.weight, buffers.stream_operand),
        )
