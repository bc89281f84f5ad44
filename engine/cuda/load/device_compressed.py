"""Attention over a window and compressed blocks on the GPU: products and small arrays. Must not know of steps."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.compressed.blocks import BlockConstants
from engine.cuda.launch_plan.parts.compressed import CompressedPlan
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.rows.parts import DeviceNorm, DeviceRope


@dataclass(frozen=True, eq=False)
class DeviceCompressed:
    """One layer; see CompressedPlan for its products.

    Attributes:
        q_a_norm, q_norm, kv_norm: of the low-rank query, of each head's query, of the key.
        rope: of the last numbers of queries and keys. back: the opposite.
        kept: what the kernels read.
    """

    plan: CompressedPlan
    inputs: DeviceProjection
    q_b: DeviceProjection
    index_q: DeviceProjection | None
    output_a: tuple[DeviceProjection, ...]
    output: DeviceProjection
    q_a_norm: DeviceNorm
    q_norm: DeviceNorm
    kv_norm: DeviceNorm
    rope: DeviceRope
    back: DeviceRope
    kept: BlockConstants

    @property
    def input_bytes(self) -> int:
        """Packed size of the matrices in front of attention."""
        return self.inputs.n_bytes + self.q_b.n_bytes + (0 if self.index_q is None else self.index_q.n_bytes)

    @property
    def output_bytes(self) -> int:
        """Packed size of those behind it."""
        return self.output.n_bytes + sum(one.n_bytes for one in self.output_a)
