"""Products on the GPU: packed matrices with the launchers that the plan asks for. Must not know of layers."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.products import Product
from engine.cuda.matrix.decode_gemm import DecodeGemm
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.matrix.matvec import MatVec


@dataclass(frozen=True, eq=False)
class DeviceProduct:
    """A product: out = alpha * (W x + bias), at `plan.column` of its projection.

    Attributes:
        plan: which kernels multiply.
        group: the matrices.
        matvec: their launcher of the family MATVEC; decode_gemm: of DECODE_GEMM. None where no step takes the family.
        bias: float32 (width,), already divided by alpha; None for none.
        alpha: factor of the result.
    """

    plan: Product
    group: MatrixGroup
    matvec: MatVec | None
    decode_gemm: DecodeGemm | None
    bias: DeviceArray | None
    alpha: float


@dataclass(frozen=True, eq=False)
class DeviceProjection:
    """One or several linear maps of the same input, outputs side by side.

    Attributes:
        parts: products. width: output columns. columns: input columns.
    """

    parts: tuple[DeviceProduct, ...]
    width: int
    columns: int

    @property
    def n_bytes(self) -> int:
        """Packed size of the matrices."""
        return sum(part.group.n_bytes for part in self.parts)
