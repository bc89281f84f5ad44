"""Latent attention (DeepSeek-2) between the layer's norm and its output projection; see model.config.LatentConfig.

The attention kernels see ordinary heads: absorbed, one key head of rank + rope columns and one value head of rank
columns for all queries; else a key and a value head for every query head. Must not know of batches.

Letters: T rows, H heads, N, R and V widths of a head's unrotated part, rotated part and value, L rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from engine.cuda.experts.moe import HeadProducts
from engine.cuda.load.buffers import Activations
from engine.cuda.matrix.linear import Projection
from engine.cuda.rows import parts
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm, DeviceRope
from engine.model.config import LatentConfig


class Product(Protocol):
    """product(projection, x, out, norm=None): out = projection of norm(x)."""

    def __call__(self, projection: Projection, x: Any, out: Any, *, norm: DeviceNorm | None = None) -> None:
        """Multiplies float32 rows."""


@dataclass(frozen=True, eq=False)
class DeviceLatent:
    """Weights of latent attention.

    Attributes:
        config: widths.
        heads: H.
        inputs: queries (H (N + R)) or their compression, then the latent vector and the shared rotated part (L + R).
        q_a_norm: norm of the compression. q_b: queries from it. None where queries come at once.
        kv_a_norm: norm of the latent vector.
        k_b: of every head, its queries to the latent space (L, N). v_b: of every head, values from it (V, L). Empty
            where not absorbed.
        k_heads: all of k_b in one launch, for decode steps; v_heads: all of v_b. None where their type forbids it.
        kv_b: (H (N + V), L), where not absorbed.
        rope: rotation of the R columns.
    """

    config: LatentConfig
    heads: int
    inputs: Projection
    q_a_norm: DeviceNorm | None
    q_b: Projection | None
    kv_a_norm: DeviceNorm
    k_b: tuple[Projection, ...]
    v_b: tuple[Projection, ...]
    k_heads: HeadProducts | None
    v_heads: HeadProducts | None
    kv_b: Projection | None
    rope: DeviceRope


def latent_qkv(
    latent: DeviceLatent,
    product: Product,
    x: Any,
    norm: DeviceNorm | None,
    buffers: Activations,
    positions: Any,
    qkv: Any,
    *,
    at_once: bool,
) -> None:
    """Queries, keys and values as the attention kernels read them.

    Args:
        latent: the weights.
        product: multiplies.
        x: float32 (T, D).
        norm: what the first product applies to x.
        buffers: inputs, queries, heads and attention are overwritten.
        positions: int32 (T,).
        qkv: float32 (T, row width of the layer's AttentionShape), contiguous, written.
        at_once: take the products of all heads in one launch, where there are such.
    """
    config, heads, n = latent.config, latent.heads, int(x.shape[0])
    nope, rank = config.nope_width, config.rank
    width = nope + config.rope_width
    inputs = _rows(buffers.inputs, n, latent.inputs.width)
    product(latent.inputs, x, inputs, norm=norm)
    at = latent.inputs.width - rank - config.rope_width
    queries, compressed, turned = inputs[:, :at], inputs[:, at : at + rank], inputs[:, at + rank :]
    if latent.q_b is not None:
        if latent.q_a_norm is not None:
            parts.normalize(queries, queries, latent.q_a_norm)
        expanded = _rows(buffers.queries, n, heads * width)
        product(latent.q_b, queries, expanded)
        queries = expanded
    by_head = queries.reshape(n, heads, width)
    if latent.kv_b is None:
        key_width = rank + config.rope_width
        key, value = qkv[:, heads * key_width : (heads + 1) * key_width], qkv[:, (heads + 1) * key_width :]
        parts.normalize(compressed, value, latent.kv_a_norm)
        parts.normalize(compressed, key[:, :rank], latent.kv_a_norm)
        parts.rotate(turned[:, None], key[:, None, rank:], latent.rope, positions)
        absorbed = qkv[:, : heads * key_width].reshape(n, heads, key_width)
        if at_once and latent.k_heads is not None:
            plain, result = _rows(buffers.heads, n * heads, nope), _rows(buffers.attention, n * heads, rank)
            parts.rotate(by_head[:, :, :nope], plain.reshape(n, heads, nope), NO_ROPE, positions)
            latent.k_heads(plain, result)
            parts.rotate(result.reshape(n, heads, rank), absorbed[:, :, :rank], NO_ROPE, positions)
        else:
            for head, k_b in enumerate(latent.k_b):
                product(k_b, queries[:, head * width : head * width + nope], absorbed[:, head, :rank])
        parts.rotate(by_head[:, :, nope:], absorbed[:, :, rank:], latent.rope, positions)
        return
    parts.normalize(compressed, compressed, latent.kv_a_norm)
    both = _rows(buffers.heads, n, heads * (nope + config.value_width))
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


def latent_values(latent: DeviceLatent, product: Product, attended: Any, buffers: Activations, *, at_once: bool) -> Any:
    """What the output projection reads: attended itself, or absorbed (T, H L) the values of every head, (T, H V).

    at_once as in latent_qkv().
    """
    if not latent.v_b:
        return attended
    rank, width = latent.config.rank, latent.config.value_width
    n, heads = int(attended.shape[0]), latent.heads
    out = _rows(buffers.heads, n, heads * width)
    if at_once and latent.v_heads is not None:
        latent.v_heads(attended.reshape(n * heads, rank), out.reshape(n * heads, width))
        return out
    for head, v_b in enumerate(latent.v_b):
        product(v_b, attended[:, head * rank : (head + 1) * rank], out[:, head * width : (head + 1) * width])
    return out


def _rows(buffer: Any, n: int, width: int) -> Any:
    """The first n * width floats of a buffer as (n, width)."""
    return buffer.reshape(-1)[: n * width].reshape(n, width)
