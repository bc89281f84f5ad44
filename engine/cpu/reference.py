"""The reference: what each step of a model computes, in plain numpy, in float32 (products of matrices: products/).

Pure functions of arrays; no files, caches or threads. Letters: T tokens, D width, H heads,
K key/value heads, Hd and Hv widths of a key and a value head, F feed-forward width, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import numpy.typing as npt

from engine.model.config import (
    Activation,
    AttentionConfig,
    AttentionTemperature,
    FfnConfig,
    NormKind,
    QkNorm,
    RopeStyle,
)
from engine.model.relative import relative_buckets
from engine.model.weights import Norm

Float32Array = npt.NDArray[np.float32]
CacheArray = npt.NDArray[np.float16 | np.float32]

SCORE_BYTES = 32 * 2**20
"""Most bytes of attention scores held at once."""

PIECE_BYTES = 8 * 2**20
"""Most bytes of cached keys or values held as float32 at once."""

SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702
"""Constants of Activation.SWIGLU_CLAMPED."""

GELU_LIMIT = 10.0
"""Beyond it GELU is max(x, 0)."""


@dataclass(frozen=True)
class _Extra:
    """What some models add to scores: see attend()."""

    sinks: Float32Array | None
    alibi_slopes: Float32Array | None
    relative_bias: Float32Array | None


def normalize(x: Float32Array, norm: Norm) -> Float32Array:
    """Normalize the last axis, multiply by the weight and add the bias, where there are any."""
    if norm.kind is NormKind.LAYER:
        x = np.subtract(x, np.add.reduce(x, axis=-1, keepdims=True) / x.shape[-1], dtype=np.float32)
    deviation = np.add.reduce(x * x, axis=-1, keepdims=True)
    deviation /= x.shape[-1]
    deviation += np.float32(norm.epsilon)
    np.sqrt(deviation, out=deviation)
    y: Float32Array = np.divide(x, deviation, dtype=np.float32)
    if norm.weight is not None:
        y *= norm.weight
    if norm.bias is not None:
        y += norm.bias
    return y


def normalize_heads(x: Float32Array, norm: Norm, kind: QkNorm) -> Float32Array:
    """Normalize q or k (T, heads, Hd) as `kind` says."""
    if kind is QkNorm.WIDTH:
        return normalize(x.reshape(len(x), -1), norm).reshape(x.shape)
    return normalize(x, norm)


def rotate(x: Float32Array, cos: Float32Array, sin: Float32Array, style: RopeStyle) -> None:
    """Rotate pairs of the leading elements of every head, in place.

    Args:
        x: (T, heads, Hd).
        cos: (T, n_rot / 2); the first n_rot elements of a head are rotated.
        sin: the same shape.
        style: which elements form a pair.
    """
    n_rot = 2 * cos.shape[-1]
    if style is RopeStyle.NORM:
        first, second = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    else:
        first, second = x[..., : n_rot // 2], x[..., n_rot // 2 : n_rot]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = first * cos - second * sin
    second[...] = second * cos + first * sin
    first[...] = turned


def temperature_factors(positions: npt.NDArray[np.int32], temperature: AttentionTemperature) -> Float32Array:
    """(T,) factors on the queries of each position."""
    steps = (positions.astype(np.int64) + temperature.offset) // temperature.length
    return (1.0 + temperature.scale * np.log1p(steps)).astype(np.float32)


def widen(half: CacheArray) -> Float32Array:
    """Float16 to float32; a float32 array is returned as it is.

    Moves the bits into place and corrects the exponent's offset (15 to 127) by one product, which also gets subnormals
    right: 4 to 8 times faster than astype in numpy 2.4. Infinity and NaN, which come out as 65536 and more, are then
    converted by astype.
    """
    if half.dtype == np.float32:
        return cast(Float32Array, half)
    bits = half.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # sign, then three cleared bits left over from the sign extension
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    special = np.abs(wide) >= np.float32(2.0**16)
    if special.any():
        wide[special] = half[special].astype(np.float32)
    return wide


def attend(
    q: Float32Array,
    keys: CacheArray,
    values: CacheArray,
    attention: AttentionConfig,
    n_past: int,
    *,
    sinks: Float32Array | None = None,
    alibi_slopes: Float32Array | None = None,
    relative_bias: Float32Array | None = None,
) -> Float32Array:
    """Attention of the newest rows of one sequence over its cache: causal, or of a whole text over itself.

    Works on a few queries and a piece of the cache at a time, so that memory does not grow with their product.

    Args:
        q: (T, H, Hd), queries at positions n_past ... n_past + T - 1.
        keys: (K, n_past + T, Hd), float16 or float32.
        values: (K, n_past + T, Hv).
        attention: scale, window or chunks, softcap and head counts, and whether it is causal.
        n_past: positions before the first query; 0 where attention is not causal.
        sinks: (H,) one more score of every query head, or None.
        alibi_slopes: (H,) how much smaller a score becomes per position between query and key, or None.
        relative_bias: (buckets, H) added to scores by the kind of distance (engine.model.relative), or None.

    Returns:
        (T, H · Hv) float32.
    """
    n_rows, n_heads = q.shape[0], attention.n_heads
    extra = _Extra(sinks, alibi_slopes, relative_bias)
    rows_at_once = max(1, SCORE_BYTES // (4 * n_heads * (n_past + n_rows)))
    if n_rows <= rows_at_once:
        return _attend_rows(q, keys, values, attention, n_past, extra)
    out = np.empty((n_rows, n_heads * attention.value_width), dtype=np.float32)
    for start in range(0, n_rows, rows_at_once):
        stop = min(start + rows_at_once, n_rows)
        out[start:stop] = _attend_rows(q[start:stop], keys, values, attention, n_past + start, extra)
    return out


def _attend_rows(
    q: Float32Array,
    keys: CacheArray,
    values: CacheArray,
    attention: AttentionConfig,
    n_past: int,
    extra: _Extra,
) -> Float32Array:
    """attend() for queries whose scores fit in memory."""
    n_rows, n_kv, group = q.shape[0], attention.n_kv_heads, attention.group
    begin, end = _seen(attention, n_past, n_rows, keys.shape[1])
    piece = max(64, PIECE_BYTES // (4 * n_kv * max(attention.key_width, attention.value_width)))
    # (T, K, G, Hd) -> (K, G·T, Hd): the query heads of one key head are one matrix.
    grouped = q.reshape(n_rows, n_kv, group, -1).transpose(1, 2, 0, 3).reshape(n_kv, group * n_rows, -1)
    grouped = grouped * np.float32(attention.scale)
    scores = np.empty((n_kv, group * n_rows, end - begin), dtype=np.float32)
    for start in range(begin, end, piece):
        stop = min(start + piece, end)
        np.matmul(grouped, widen(keys[:, start:stop]).transpose(0, 2, 1), out=scores[..., start - begin : stop - begin])
    by_head = scores.reshape(n_kv, group, n_rows, end - begin)
    if attention.softcap is not None:
        softcap(scores, attention.softcap)
    distance = np.arange(begin, end)[None, :] - np.arange(n_past, n_past + n_rows)[:, None]
    if extra.alibi_slopes is not None:
        by_head -= extra.alibi_slopes.reshape(n_kv, group, 1, 1) * np.abs(distance).astype(np.float32)
    if extra.relative_bias is not None:
        bias = extra.relative_bias[relative_buckets(distance, len(extra.relative_bias))]
        by_head += bias.transpose(2, 0, 1).reshape(n_kv, group, *distance.shape)
    if n_rows > 1 or not attention.causal:
        _mask(by_head, n_past, begin, attention)
    softmax(by_head, None if extra.sinks is None else extra.sinks.reshape(n_kv, group, 1, 1))
    out = np.zeros((n_kv, group * n_rows, attention.value_width), dtype=np.float32)
    for start in range(begin, end, piece):
        stop = min(start + piece, end)
        _add_values(out, scores[..., start - begin : stop - begin], widen(values[:, start:stop]))
    return out.reshape(n_kv, group, n_rows, -1).transpose(2, 0, 1, 3).reshape(n_rows, -1)


def _add_values(out: Float32Array, weights: Float32Array, values: Float32Array) -> None:
    """out += weights · values; out (K, R, Hv), weights (K, R, n), values (K, n, Hv).

    A weight of 0 leaves its position out: 0 · NaN is NaN, and a masked position must not change a row.
    """
    finite = np.isfinite(values)
    if finite.all():
        out += np.matmul(weights, values)
        return
    out += np.matmul(weights, np.where(finite, values, np.float32(0.0)))
    for position in np.flatnonzero(~finite.all(axis=(0, 2))):
        weight = weights[:, :, position, None]
        rest = np.where(finite[:, None, position], np.float32(0.0), values[:, None, position])
        out += np.multiply(weight, rest, out=np.zeros_like(out), where=weight != 0.0)


def _seen(attention: AttentionConfig, n_past: int, n_rows: int, n_keys: int) -> tuple[int, int]:
    """The first key that some of the queries see, and the one after the last."""
    first, after = int(_first_seen(np.array(n_past), attention)), n_past + n_rows
    if attention.causal:
        return first, after
    return first, n_keys if attention.window is None else min(n_keys, after + attention.window // 2)


def _first_seen(query: npt.NDArray[np.intp], attention: AttentionConfig) -> npt.NDArray[np.intp]:
    """The first position that queries at these positions see."""
    if attention.chunk is not None:
        return query // attention.chunk * attention.chunk
    if attention.window is None:
        return np.zeros_like(query)
    back = attention.window - 1 if attention.causal else attention.window // 2
    return np.maximum(0, query - back)


def _mask(scores: Float32Array, n_past: int, begin: int, attention: AttentionConfig) -> None:
    """Forbid keys that a query does not see; scores (K, G, T, keys from `begin` on), in place."""
    query = np.arange(n_past, n_past + scores.shape[2])
    key = np.arange(begin, begin + scores.shape[3])[None, :]
    forbidden = key < _first_seen(query, attention)[:, None]
    if attention.causal:
        forbidden |= key > query[:, None]
    elif attention.window is not None:
        forbidden |= key > query[:, None] + attention.window // 2
    np.copyto(scores, np.float32(-np.inf), where=forbidden)


def softmax(x: Float32Array, sinks: Float32Array | None = None) -> None:
    """exp(x) / sum(exp(x)) over the last axis, in place; the sum counts `sinks` (last axis 1) as one more x."""
    highest = np.maximum.reduce(x, axis=-1, keepdims=True)
    if sinks is not None:
        highest = np.maximum(highest, sinks)
    x -= highest
    np.exp(x, out=x)
    total = np.add.reduce(x, axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - highest)
    x /= total


def softcap(x: Float32Array, limit: float) -> None:
    """limit · tanh(x / limit), in place."""
    x /= np.float32(limit)
    np.tanh(x, out=x)
    x *= np.float32(limit)


def thin_out(gate: Float32Array, sparsity: float) -> Float32Array:
    """FfnConfig.sparsity: what exceeds the mean of a row by so many deviations, 0 elsewhere; gate (T, F)."""
    mean = np.add.reduce(gate, axis=-1, keepdims=True) / np.float32(gate.shape[-1])
    apart = gate - mean
    variance = np.add.reduce(apart * apart, axis=-1, keepdims=True) / np.float32(gate.shape[-1] - 1)
    return np.maximum(apart - np.sqrt(variance) * np.float32(sparsity), np.float32(0.0))


def gated(gate: Float32Array, up: Float32Array, config: FfnConfig) -> Float32Array:
    """activation(gate) · up, thinned out and limited where FfnConfig says so; may overwrite both."""
    activation, limit = config.activation, config.limit
    if config.sparsity:
        gate = thin_out(gate, config.sparsity)
    if limit is not None and config.limits_gate:
        gate = np.minimum(gate, np.float32(limit))
    if activation is Activation.SITU:
        assert config.caps is not None
        factor = sigmoid(gate)
        softcap(gate, config.caps[0])
        gate *= factor
        if config.caps[1]:
            softcap(up, config.caps[1])
    elif activation is Activation.SWIGLU_CLAMPED:
        gate = np.minimum(gate, np.float32(SWIGLU_LIMIT))
        up = np.clip(up, np.float32(-SWIGLU_LIMIT), np.float32(SWIGLU_LIMIT))
        gate *= sigmoid(np.float32(SWIGLU_SLOPE) * gate)
        up += np.float32(1.0)
    else:
        gate = activate(gate, activation)
    if limit is not None:
        up = np.clip(up, np.float32(-limit), np.float32(limit))
        gate = gate if config.limits_gate else np.minimum(gate, np.float32(limit))
    gate *= up
    return gate


def activate(
    x: Float32Array, activation: Activation, xielu: tuple[float, float, float, float] | None = None
) -> Float32Array:
    """The non-linearity of a feed-forward part; `xielu` are the constants of Activation.XIELU."""
    if activation is Activation.XIELU:
        assert xielu is not None
        positive, negative, beta, epsilon = (np.float32(value) for value in xielu)
        below = (np.expm1(np.minimum(x, epsilon)) - x) * negative
        curved: Float32Array = np.where(x > 0, positive * x * x, below)
        return curved + beta * x
    if activation is Activation.SILU:
        return x * sigmoid(x)
    if activation in (Activation.RELU, Activation.RELU_SQUARED):
        y = np.maximum(x, np.float32(0.0))
        return y * y if activation is Activation.RELU_SQUARED else y
    assert activation is Activation.GELU
    return gelu(x)


def gelu(x: Float32Array) -> Float32Array:
    """See Activation.GELU: float16 has so few numbers that all results fit in a table."""
    y = _gelu_table()[x.astype(np.float16).view(np.uint16)]
    np.copyto(y, np.maximum(x, np.float32(0.0)), where=np.abs(x) >= GELU_LIMIT)
    return y


@cache
def _gelu_table() -> Float32Array:
    """(65536,) GELU of every float16, rounded to float16; exact elsewhere than between the limits is not needed."""
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    x[np.isinf(x)] = 0.0
    y = 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)))
    return y.astype(np.float16).astype(np.float32)


def sigmoid(x: Float32Array) -> Float32Array:
    """1 / (1 + exp(-x)); exp may overflow to infinity, which gives the right 0."""
    y = np.exp(-x)
    y += np.float32(1.0)
    return np.divide(np.float32(1.0), y, out=y)
