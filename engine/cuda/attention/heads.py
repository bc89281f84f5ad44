"""Queries and keys between their projection and attention, where the attention kernels cannot do it themselves.

Those norm single heads by RMS, rotate and append in passing; models with limits, with norms of another kind, or with a
norm behind the rotation get row kernels before them. Must not know of batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.attention.attention_shape import AttentionShape
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.rows import parts
from engine.cuda.rows.parts import DeviceNorm, DeviceRope
from engine.model.config import QkNorm


@dataclass(frozen=True, eq=False)
class HeadSteps:
    """What happens to queries and keys, in this order.

    Attributes:
        clamp: limit of queries, keys and values, or None.
        rope: rotation before the norms; None: it comes later, in the attention kernels.
        q_norm: norm of the queries, or None. k_norm: of the keys. v_norm: of each head's values.
        kind: what the norms of queries and keys take together.
    """

    clamp: float | None
    rope: DeviceRope | None
    q_norm: DeviceNorm | None
    k_norm: DeviceNorm | None
    v_norm: DeviceNorm | None
    kind: QkNorm | None


def prepare_heads(steps: HeadSteps, shape: AttentionShape, qkv: DeviceArray, positions: DeviceArray) -> None:
    """Changes qkv in place.

    Args:
        steps: what to do.
        shape: heads of the layer.
        qkv: float32 (T, shape.row_width), contiguous.
        positions: int32 (T,); rows with -1 are not rotated.
    """
    if steps.clamp is not None:
        parts.clamp(qkv, steps.clamp)
    heads, kv_heads, width = shape.heads, shape.kv_heads, shape.key_dim
    if steps.rope is not None:
        both = qkv[:, : (heads + kv_heads) * width].reshape(-1, heads + kv_heads, width)
        parts.rotate(both, both, steps.rope, positions)
    first = 0
    for count, norm in ((heads, steps.q_norm), (kv_heads, steps.k_norm)):
        part = qkv[:, first : first + count * width]
        first += count * width
        if norm is not None:
            pieces = 1 if steps.kind is QkNorm.WIDTH else count
            own = norm.weight is not None and pieces > 1 and norm.weight.size > width
            parts.normalize(part, part, norm, pieces=pieces, own_weights=own)
    if steps.v_norm is not None:
        values = qkv[:, first : first + kv_heads * shape.value_dim]
        parts.normalize(values, values, steps.v_norm, pieces=kv_heads)
