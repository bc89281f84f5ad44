"""Products of prompt rows: each matrix by the kernels that suit it and the card.

On Hopper the packed weights go straight to the tensor cores (gemm.py); float32 matrices, and everything on other cards,
are expanded and multiplied by cuBLAS (dense.py). Must not know of layers or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.cuda.driver.compiler import device_arch
from engine.cuda.experts import prefill as expert_ops
from engine.cuda.formats.layouts import kept_as
from engine.cuda.load.needs import ACTIVATIONS, stacked_layers
from engine.cuda.load.weights import DeviceFfn, DeviceMoe
from engine.cuda.matrix import gemm
from engine.cuda.matrix.dense import DenseProduct, padded
from engine.cuda.matrix.gemm import Gemm, Operand, make_operand, operand_bytes
from engine.cuda.matrix.linear import Projection
from engine.cuda.matrix.matvec import Activation
from engine.cuda.rows import rows as row_ops
from engine.gguf.types import GGMLType
from engine.model.loader import LoadedModel

Group = tuple[list[tuple[GGMLType, int]], int, bool, Activation]
"""A kind of launch, as needs.kernel_groups() gives it: (type, rows) of its matrices, columns, paired, activation."""


def _needs(groups: Sequence[Group]) -> tuple[list[GGMLType], list[Activation]]:
    """Tensor types of all matrices, and the activations between gate and up."""
    types = sorted({type for shapes, *_ in groups for type, _ in shapes}, key=lambda type: type.value)
    activations = sorted({activation for _, _, paired, activation in groups if paired}) or [Activation.NONE]
    return types, activations


def build_jobs(groups: Sequence[Group], arch: int) -> list[gemm.Job]:
    """The (files, defines) pairs that these products need beside dequant.build_jobs, for module.prebuild."""
    if arch != gemm.ARCH:
        return []
    types, activations = _needs(groups)
    return [job for activation in activations for job in gemm.build_jobs(types, activation)]


def build_expert_jobs(groups: Sequence[Group], model: LoadedModel, arch: int) -> list[gemm.Job]:
    """What the experts of prompts need more, where the card serves them."""
    types, _ = _needs(groups)
    jobs: list[gemm.Job] = []
    for moe, config in stacked_layers(model, arch):
        needed = [kept_as(moe.up.weight.type), kept_as(moe.down.weight.type)]
        jobs += gemm.expert_jobs(types, needed, ACTIVATIONS[config.expert.activation])
        jobs += expert_ops.build_jobs()
    return jobs


class Products:
    """out = or += norm(x) @ W.T for the launches of a model, with bias, factor and gate.

    Results are the same bits for a row whatever the other rows are: on Hopper always, elsewhere if deterministic.

    Args:
        groups: what will come, from needs.kernel_groups(prompts=True).
        room: uint8, where operands lie: as Activations.operand.
        deterministic: pay for that on other cards too; see DenseProduct.
        fused: False forces cuBLAS for all.
        halves_apart: gate and up of paired matrices will be needed apart.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        room: Any,
        *,
        deterministic: bool = False,
        fused: bool = True,
        halves_apart: bool = False,
    ) -> None:
        types, activations = _needs(groups)
        self._room = room
        self._gemms: dict[Activation, Gemm] = {}
        if fused and device_arch() == gemm.ARCH:
            self._gemms = {activation: Gemm(types, activation) for activation in activations}
        self._any = next(iter(self._gemms.values()), None)
        alone = [type for type in types if not self._fused(type)]
        fixed_rows = deterministic or self._any is not None
        self._dense = DenseProduct(fixed_rows=fixed_rows) if alone or halves_apart else None

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        return self._dense.n_bytes if self._dense else 0

    def _fused(self, type: GGMLType) -> bool:
        return self._any is not None and gemm.supports(type)

    def product(
        self, projection: Projection, x: Any, out: Any, *, norm: Any = None, eps: float = 0.0, add: bool = False
    ) -> None:
        """Multiplies T rows.

        Args:
            projection: the matrices.
            x: float32 (T, K), or what gated() returned.
            out: float32 (T, projection.width), row stride free.
            norm: float32 (K,), weight of an RMSNorm of x; None for none.
            eps: the norm's epsilon.
            add: add to out.
        """
        operand: Any = x if isinstance(x, Operand) else None
        for part in projection.parts:
            width = part.matvec.width
            target = out[:, part.column : part.column + width]
            if all(self._fused(matrix.type) for matrix in part.matvec.matrices):
                assert self._any is not None
                operand = operand if isinstance(operand, Operand) else make_operand(x, self._room, norm=norm, eps=eps)
                self._any(part.matvec, operand, target, bias=part.bias, add=add, alpha=part.alpha)
                continue
            assert self._dense is not None
            column = 0
            for matrix in part.matvec.matrices:
                wide = matrix.type is GGMLType.F32
                if not (hasattr(operand, "dtype") and (operand.dtype.itemsize == 4) == wide):
                    operand = self._plain(x, wide, norm, eps)
                self._dense(
                    matrix, operand, target[:, column : column + matrix.rows], rows=len(x), alpha=part.alpha, add=add
                )
                column += matrix.rows
            if part.bias is not None:
                row_ops.add_bias(target, part.bias, part.alpha)

    def gated(self, ffn: DeviceFfn, x: Any, gate: Any, up: Any, *, norm: Any = None, eps: float = 0.0) -> Any:
        """activation(gate(norm(x))) * up(norm(x)) of a paired matrix.

        Args:
            ffn: the part; its gate and up are paired.
            x: float32 (T, D).
            gate: float32 (R, >= F), contiguous, R >= T; the result lies in its memory.
            up: as gate, scratch.
            norm: float32 (D,) or None.
            eps: its epsilon.

        Returns:
            float32 (T, F), or an Operand where the down projection can take one.
        """
        paired, n = ffn.paired, len(x)
        assert paired is not None
        h = gate.reshape(-1)[: n * ffn.width].reshape(n, ffn.width)
        matrix = paired.matrices[0]
        if self._fused(matrix.type) and not ffn.halves_apart:
            product = self._gemms[ffn.activation]
            operand = make_operand(x, self._room, norm=norm, eps=eps)
            hidden = product.gated(paired, operand, self._hidden_room(ffn, n, gate) if self._chains(ffn) else h)
            return h if hidden is None else hidden
        assert self._dense is not None
        wide = matrix.type is GGMLType.F32
        other = up.reshape(-1)[: n * ffn.width].reshape(n, ffn.width)
        self._dense(matrix, self._plain(x, wide, norm, eps), h, rows=n, second=other)
        for half, bias in ((h, ffn.gate_bias), (other, ffn.up_bias)):
            if bias is not None:
                row_ops.add_bias(half, bias, 1.0)
        row_ops.gate(h, other, ffn.activation)
        return h

    def serves_experts(self, moe: DeviceMoe) -> bool:
        """Whether experts() multiplies this mixture."""
        return moe.stacked is not None and self._any is not None

    def experts(
        self,
        moe: DeviceMoe,
        x: Any,
        scores: Any,
        room: Any,
        out: Any,
        *,
        norm: Any = None,
        eps: float = 0.0,
        positions: Any = None,
    ) -> None:
        """Adds the experts that each row chooses to out; see experts.run."""
        assert moe.stacked is not None
        product = self._gemms[moe.experts[0].activation]
        expert_ops.run(moe.stacked, product, x, scores, room, out=out, norm=norm, eps=eps, positions=positions)

    def _chains(self, ffn: DeviceFfn) -> bool:
        """Whether the down projection takes the hidden vectors as an operand."""
        types = [matrix.type for part in ffn.down.parts for matrix in part.matvec.matrices]
        return ffn.width % 128 == 0 and all(self._fused(type) for type in types)

    @staticmethod
    def _hidden_room(ffn: DeviceFfn, n: int, gate: Any) -> Any:
        import cupy

        room, size = gate.reshape(-1).view(cupy.uint8), operand_bytes(n, ffn.width)
        return room if size <= room.nbytes else cupy.empty(size, cupy.uint8)

    def _plain(self, x: Any, wide: bool, norm: Any, eps: float) -> Any:
        """norm(x) row-major, filled up to the rows that the dense product multiplies at a time."""
        import cupy

        dtype = cupy.dtype(cupy.float32 if wide else cupy.float16)
        n, k = x.shape
        assert self._dense is not None
        rows = padded(n) if self._dense.fixed_rows else n
        size = rows * k * dtype.itemsize
        room = self._room[:size] if size <= self._room.nbytes else cupy.empty(size, cupy.uint8)
        operand = room.view(dtype).reshape(rows, k)
        row_ops.normalize(x, operand, norm, eps)
        return operand
