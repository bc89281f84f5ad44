"""RWKV: time mixing of versions 6 and 7 (Rwkv6Config, Rwkv7Config) and channel mixing (ChannelMixConfig)."""

from __future__ import annotations

import math

import numpy as np

from engine.cpu.recurrent.tools import Float32Array, Tools
from engine.cpu.reference import sigmoid
from engine.model.config import ChannelMixConfig, Rwkv6Config, Rwkv7Config
from engine.model.weights import ChannelMixWeights, LowRank, Rwkv6Weights, Rwkv7Weights

DECAY = np.float32(-math.exp(-0.5))
"""Least logarithm of a decay of version 7."""

SHORTEST = np.float32(1e-12)
"""Least length that a key is divided by."""


def decayed_products(
    r: Float32Array,
    w: Float32Array,
    k: Float32Array,
    v: Float32Array,
    first: Float32Array | None,
    state: Float32Array,
) -> tuple[Float32Array, Float32Array]:
    """The recurrence of version 6 over the tokens of one sequence: y = r · (M + (first · k) ⊗ v), M = w · M + k ⊗ v.

    Args:
        r: (T, H, S).
        w: (T, H, S) factors on the rows of M.
        k: (T, H, S).
        v: (T, H, S).
        first: (H, S); None: M changes first, and y = r · M.
        state: (H, S, S) M before the first token; zeros at the beginning of a sequence.

    Returns:
        y (T, H, S) and M (H, S, S) after the last token.
    """
    out = np.empty_like(v)
    state = state.copy()
    for token in range(len(v)):
        pair = k[token][..., None] * v[token][:, None]
        if first is not None:
            read = state + first[..., None] * pair
        state *= w[token][..., None]
        state += pair
        if first is None:
            read = state.copy()
        read *= r[token][..., None]
        np.add.reduce(read, axis=1, out=out[token])
    return out, state


def corrected_products(
    r: Float32Array,
    w: Float32Array,
    k: Float32Array,
    v: Float32Array,
    removed: Float32Array,
    rate: Float32Array,
    state: Float32Array,
) -> tuple[Float32Array, Float32Array]:
    """The recurrence of version 7 over the tokens of one sequence: M = M · diag(w) - (M κ) ⊗ (κ · a) + v ⊗ k; y = M r.

    Args:
        r: (T, H, S).
        w: (T, H, S) factors on the columns of M.
        k: (T, H, S).
        v: (T, H, S).
        removed: (T, H, S) κ.
        rate: (T, H, S) a.
        state: (H, S, S) M before the first token, rows for values; zeros at the beginning of a sequence.

    Returns:
        y (T, H, S) and M (H, S, S) after the last token.
    """
    out = np.empty_like(v)
    state, term = state.copy(), np.empty_like(state)
    written = removed * rate
    for token in range(len(v)):
        np.multiply(state, removed[token][:, None], out=term)
        old = np.add.reduce(term, axis=-1)
        state *= w[token][:, None]
        np.multiply(old[..., None], written[token][:, None], out=term)
        state -= term
        np.multiply(v[token][..., None], k[token][:, None], out=term)
        state += term
        np.multiply(state, r[token][:, None], out=term)
        np.add.reduce(term, axis=-1, out=out[token])
    return out, state


def mix_rwkv_6(config: Rwkv6Config, weights: Rwkv6Weights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What Rwkv6Config says of normalized inputs (T, D), without the residual."""
    n_rows, heads, size = len(normed), config.heads, config.head_width
    change = _change(normed, tools, 0)
    low = np.tanh(tools.linear(weights.mix_a, change * weights.lerp_x + normed)).reshape(n_rows, 5, -1)
    shares = [tools.linear(weights.mix_b.expert(i), np.ascontiguousarray(low[:, i])) for i in range(5)]
    xw, xk, xv, xr, xg = ((shares[i] + weights.lerp[i]) * change + normed for i in range(5))
    r = tools.linear(weights.receptance, xr).reshape(n_rows, heads, size)
    each = heads // config.kv_heads
    k, v = (
        np.repeat(tools.linear(linear, x).reshape(n_rows, config.kv_heads, size), each, axis=1)
        for linear, x in ((weights.key, xk), (weights.value, xv))
    )
    w = tools.linear(weights.decay.b, np.tanh(tools.linear(weights.decay.a, xw)))
    w = np.exp(-np.exp(w)).reshape(n_rows, heads, size)
    gate = tools.linear(weights.gate, xg)
    if config.linear_attention:
        k = k - k * w
        r *= np.float32(1.0 / math.sqrt(size))
    out = np.empty((n_rows, heads, size), dtype=np.float32)
    for span, rows in tools.spans():
        state = tools.state(span)[1]
        out[rows], state = decayed_products(r[rows], w[rows], k[rows], v[rows], weights.first, state)
        tools.store(span, _states(normed[rows], state, config.channel_mix))
    y = tools.normalize(out, weights.norm).reshape(n_rows, -1)
    y = y * sigmoid(gate) if config.linear_attention else y * (gate * sigmoid(gate))
    return tools.linear(weights.output, y)


def mix_rwkv_7(config: Rwkv7Config, weights: Rwkv7Weights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What Rwkv7Config says of normalized inputs (T, D), without the residual."""
    n_rows, shape = len(normed), (len(normed), config.heads, config.head_width)
    change = _change(normed, tools, 0)
    xr, xw, xk, xv, xa, *xg = (change * lerp + normed for lerp in weights.lerp)
    r, k, v = (tools.linear(part, x) for part, x in ((weights.receptance, xr), (weights.key, xk), (weights.value, xv)))
    w = np.exp(DECAY * sigmoid(tools.linear(weights.decay.b, np.tanh(tools.linear(weights.decay.a, xw)))))
    if weights.first_value is None:
        tools.shared["first_value"] = v
    else:
        v = v + (tools.shared["first_value"] - v) * _rate(weights.first_value, xv, tools)
    rate = _rate(weights.rate, xa, tools)
    removed = (k * weights.k_k).reshape(shape)
    removed /= np.maximum(np.sqrt(np.add.reduce(removed * removed, axis=-1, keepdims=True)), SHORTEST)
    changed = k * weights.k_a
    k = k + (rate * changed - changed)
    r, w, k, v, rate = (part.reshape(shape) for part in (r, w, k, v, rate))
    out = np.empty(shape, dtype=np.float32)
    for span, rows in tools.spans():
        state = tools.state(span)[1]
        own = r[rows], w[rows], k[rows], v[rows], removed[rows], rate[rows]
        out[rows], state = corrected_products(*own, state)
        tools.store(span, _states(normed[rows], state, config.channel_mix))
    y = tools.normalize(out, weights.norm)
    y = (y + v * np.add.reduce(k * r * weights.r_k, axis=-1, keepdims=True)).reshape(n_rows, -1)
    if weights.gate is not None:
        y *= tools.linear(weights.gate.b, sigmoid(tools.linear(weights.gate.a, xg[0])))
    return tools.linear(weights.output, y)


def mix_channels(
    config: ChannelMixConfig, weights: ChannelMixWeights, normed: Float32Array, tools: Tools
) -> Float32Array:
    """What ChannelMixConfig says of normalized inputs (T, D), without the residual."""
    change = _change(normed, tools, 2)
    for span, rows in tools.spans():
        tools.store(span, (None, None, normed[rows][-1]))
    h = np.maximum(tools.linear(weights.key, change * weights.lerp_k + normed), np.float32(0.0))
    y = tools.linear(weights.value, h * h)
    if weights.receptance is not None and weights.lerp_r is not None:
        y *= sigmoid(tools.linear(weights.receptance, change * weights.lerp_r + normed))
    return y


def _change(normed: Float32Array, tools: Tools, place: int) -> Float32Array:
    """x' - x of every row (T, D); `place` is that of the last input among the layer's states."""
    before = np.empty_like(normed)
    for span, rows in tools.spans():
        before[rows] = np.concatenate((tools.state(span)[place][None], normed[rows][:-1]))
    before -= normed
    return before


def _states(normed: Float32Array, state: Float32Array, channel_mix: bool) -> tuple[Float32Array | None, ...]:
    """What time mixing stores behind a sequence's rows: channel mixing stores its own input."""
    return (normed[-1], state, None) if channel_mix else (normed[-1], state)


def _rate(weights: LowRank, x: Float32Array, tools: Tools) -> Float32Array:
    """sigmoid(b · a · x)."""
    return sigmoid(tools.linear(weights.b, tools.linear(weights.a, x)))
