"""Latent attention (DeepSeek-2) between the layer's norm and its output projection; see model.config.LatentConfig.

The attention kernels see ordinary heads: absorbed, one key head of rank + rope columns and one value head of rank
columns for all queries; else a key and a value head for every query head. Must not know of batches.

Letters: T rows, H heads, N, R and V widths of a head's unrotated part, rotated part and value, L rank.
"""

from __future__ import annotations

from typing import Protocol

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.experts.heads import HeadProducts
from engine.cuda.launch_plan.steps import Step
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.load.device_weights import DeviceHeads, DeviceLatent
from engine.cuda.rows import parts
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm
from engine.cuda.step.folding import columns_of


class Product(Protocol):
    """product(projection, x, out, norm=None): out = projection of norm(x)."""

    def __call__(
        self, projection: DeviceProjection, x: DeviceArray, out: DeviceArray, *, norm: DeviceNorm | None = None
    ) -> None:
        """Multiplies float32 rows."""


class LatentBuffers(Protocol):
    """Scratch memory, float32, one row for each row of a batch: see load.buffers.Activations."""

    inputs: DeviceArray
    queries: DeviceArray
    heads: DeviceArray
    attention: DeviceArray


def latent_qkv(
    latent: DeviceLatent,
    product: Product,
    x: DeviceArray,
    norm: DeviceNorm | None,
    buffers: LatentBuffers,
    positions: DeviceArray,
    qkv: DeviceArray,
    step: Step,
) -> None:
    """Queries, keys and values as the attention kernels read them.

    Compressed queries, normalized, stay where low_rank_queries() finds them.

    Args:
        latent: the weights.
        product: multiplies.
        x: float32 (T, D).
        norm: what the first product applies to x.
        buffers: inputs, queries, heads and attention are overwritten.
        positions: int32 (T,).
        qkv: float32 (T, row width of the layer's AttentionShape), contiguous, written.
        step: of the launch plan; decode steps multiply all heads in one launch, where types allow it.
    """
    config, heads, n = latent.plan.config, latent.plan.heads, int(x.shape[0])
    nope, rank = config.nope_width, config.rank
    width = nope + config.rope_width
    inputs = columns_of(buffers.inputs, n, latent.inputs.width)
    product(latent.inputs, x, inputs, norm=norm)
    at = latent.inputs.width - rank - config.rope_width
    queries, compressed, turned = inputs[:, latent.plan.gate : at], inputs[:, at : at + rank], inputs[:, at + rank :]
    if latent.q_b is not None:
        if latent.q_a_norm is not None:
            parts.normalize(queries, queries, latent.q_a_norm)
        expanded = columns_of(buffers.queries, n, heads * width)
        product(latent.q_b, queries, expanded)
        queries = expanded
    if latent.k_norm is not None:
        parts.normalize(turned, turned, latent.k_norm)
    by_head = queries.reshape(n, heads, width)
    if latent.kv_b is None:
        key_width = rank + config.rope_width
        key, value = qkv[:, heads * key_width : (heads + 1) * key_width], qkv[:, (heads + 1) * key_width :]
        parts.normalize(compressed, value, latent.kv_a_norm)
        parts.normalize(compressed, key[:, :rank], latent.kv_a_norm)
        parts.rotate(turned[:, None], key[:, None, rank:], latent.rope, positions)
        absorbed = qkv[:, : heads * key_width].reshape(n, heads, key_width)
        assert latent.k_b is not None
        joined = _joined(latent.k_b, step)
        if joined is not None:
            plain, result = columns_of(buffers.heads, n * heads, nope), columns_of(buffers.attention, n * heads, rank)
            parts.rotate(by_head[:, :, :nope], plain.reshape(n, heads, nope), NO_ROPE, positions)
            joined(plain, result)
            parts.rotate(result.reshape(n, heads, rank), absorbed[:, :, :rank], NO_ROPE, positions)
        else:
            for head, k_b in enumerate(latent.k_b.single):
                product(k_b, queries[:, head * width : head * width + nope], absorbed[:, head, :rank])
        parts.rotate(by_head[:, :, nope:], absorbed[:, :, rank:], latent.rope, positions)
        return
    parts.normalize(compressed, compressed, latent.kv_a_norm)
    both = columns_of(buffers.heads, n, heads * (nope + config.value_width))
    product(latent.kv_b, compressed, both)
    both = both.reshape(n, heads, nope + config.value_width)
    keys = qkv[:, heads * width : 2 * heads * width].reshape(n, heads, width)
    values = qkv[:, 2 * heads * width :].reshape(n, heads, config.value_width)
    of_query = qkv[:, : heads * width].reshape(n, heads, width)
    parts.rotate(both[:, :, :nope], keys[:, :, :nope], NO_ROPE, positions)
    parts.rotate(both[:, :, nope:], values, NO_ROPE, positions)
    parts.rotate(by_head[:, :, :nope], of_query[:, :, :nope], NO_ROPE, positions)
    parts.rotate(by_head[:, :, nope:], of_query[:, :, nope:], latent.rope, positions)
    for head in range(heads):
        parts.rotate(turned[:, None], keys[:, head : head + 1, nope:], latent.rope, positions)


def low_rank_queries(latent: DeviceLatent, buffers: LatentBuffers, n: int) -> DeviceArray:
    """Normalized compressed queries (n, q_rank), which latent_qkv() has left; only where there are such."""
    assert latent.q_b is not None
    inputs = columns_of(buffers.inputs, n, latent.inputs.width)
    return inputs[:, latent.plan.gate : latent.plan.gate + latent.q_b.columns]


def latent_values(
    latent: DeviceLatent, product: Product, attended: DeviceArray, buffers: LatentBuffers, step: Step
) -> DeviceArray:
    """What the output projection reads: attended itself, or absorbed (T, H L) the values of every head, (T, H V)."""
    if latent.v_b is None:
        return attended
    rank, width = latent.plan.config.rank, latent.plan.config.value_width
    n, heads = int(attended.shape[0]), latent.plan.heads
    out = columns_of(buffers.heads, n, heads * width)
    joined = _joined(latent.v_b, step)
    if joined is not None:
        joined(attended.reshape(n * heads, rank), out.reshape(n * heads, width))
        return out
    for head, v_b in enumerate(latent.v_b.single):
        product(v_b, attended[:, head * rank : (head + 1) * rank], out[:, head * width : (head + 1) * width])
    return out


def _joined(heads: DeviceHeads, step: Step) -> HeadProducts | None:
    """The launcher of all heads at once, where the step takes it."""
    return heads.joined if heads.plan.at_once(step) else None
