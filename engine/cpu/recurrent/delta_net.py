"""Gated delta rules: with one decay per head (DeltaNetConfig) and with one per key column (KimiDeltaConfig)."""

from __future__ import annotations

import math

import numpy as np

from engine.cpu.recurrent.convolution import convolved_inputs
from engine.cpu.recurrent.tools import Float32Array, Heads, Moved, Tools, softplus
from engine.cpu.reference import sigmoid
from engine.model.config import DeltaNetConfig, KimiDeltaConfig
from engine.model.weights import DeltaNetWeights, KimiDeltaWeights, Linear


def delta_rule(
    q: Float32Array, k: Float32Array, v: Float32Array, decay: Float32Array, beta: Float32Array, state: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """The recurrence over the tokens of one sequence: M = decay · M; M += k ⊗ β (v - k · M); y = q · M.

    Args:
        q: (T, H, S), scaled.
        k: (T, H, S).
        v: (T, H, P).
        decay: (T, H, S) factors on the rows of M, or (T, H, 1).
        beta: (T, H).
        state: (H, S, P) M before the first token; zeros at the beginning of a sequence.

    Returns:
        y (T, H, P) and M (H, S, P) after the last token.
    """
    out = np.empty_like(v)
    state = state.copy()
    term = np.empty_like(state)
    for token in range(len(v)):
        key = k[token][..., None]
        state *= decay[token][..., None]
        np.multiply(state, key, out=term)
        change = v[token] - np.add.reduce(term, axis=1)
        change *= beta[token][:, None]
        np.multiply(key, change[:, None], out=term)
        state += term
        np.multiply(state, q[token][..., None], out=term)
        np.add.reduce(term, axis=1, out=out[token])
    return out, state


def unit_heads(x: Float32Array, epsilon: float) -> Float32Array:
    """x / sqrt(Σ x² + ε) over the last axis."""
    length = np.add.reduce(x * x, axis=-1, keepdims=True)
    length += np.float32(epsilon)
    y: Float32Array = np.divide(x, np.sqrt(length), dtype=np.float32)
    return y


def delta_heads(
    convolved: Float32Array, heads: Heads, decay: Float32Array, beta: Float32Array, state: Float32Array
) -> Moved:
    """delta_rule of rows [q of the key heads, k of them, v]: q and k of unit length, q divided by the root of S.

    Args:
        convolved: (T, 2 · K · S + H · P).
        heads: how rows are divided.
        decay: (T, H, S) or (T, H, 1).
        beta: (T, H).
        state: (H, S, P) before the first token.
    """
    n_heads, size, width = state.shape
    keys, each = heads.key_heads * size, n_heads // heads.key_heads
    q, k, v = np.split(convolved, (keys, 2 * keys), axis=1)
    q, k = (unit_heads(x.reshape(len(x), -1, size), heads.epsilon) for x in (q, k))
    q *= np.float32(1.0 / math.sqrt(size))
    q, k = (np.repeat(x, each, axis=1) if heads.grouped else np.tile(x, (1, each, 1)) for x in (q, k))
    return delta_rule(q, k, v.reshape(len(v), n_heads, width), decay, beta, state)


def _move(
    tools: Tools, convolved: Float32Array, heads: Heads, decay: Float32Array, beta: Float32Array, state: Float32Array
) -> Moved:
    kernels = tools.kernels
    found = None if kernels is None else kernels.delta_rule(convolved, heads, decay, beta, state)
    return found or delta_heads(convolved, heads, decay, beta, state)


def mix_delta_net(config: DeltaNetConfig, weights: DeltaNetWeights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What DeltaNetConfig says of normalized inputs (T, D), without the residual."""
    n_rows, size = len(normed), config.head_width
    qkv, z = tools.linear(weights.qkv, normed), tools.linear(weights.z, normed)
    beta = sigmoid(tools.linear(weights.beta, normed))
    decay = np.exp(softplus(tools.linear(weights.alpha, normed) + weights.dt_bias) * weights.a)[..., None]
    heads = Heads(config.key_heads, config.grouped, weights.norm.epsilon)
    out = np.empty((n_rows, config.heads, size), dtype=np.float32)
    for span, rows in tools.spans():
        past, state = tools.state(span)
        convolved, past = convolved_inputs(tools, qkv[rows], weights.conv1d, None, past)
        out[rows], state = _move(tools, convolved, heads, decay[rows], beta[rows], state)
        tools.store(span, (past, state))
    y = tools.normalize(out, weights.norm).reshape(n_rows, -1)
    if config.sigmoid_gate:
        y *= sigmoid(z)
    else:
        y = tools.gated(y, z)
    return tools.linear(weights.ssm_out, y)


def mix_kimi_delta(
    config: KimiDeltaConfig, weights: KimiDeltaWeights, normed: Float32Array, tools: Tools
) -> Float32Array:
    """What KimiDeltaConfig says of normalized inputs (T, D), without the residual."""
    n_rows, heads, size = len(normed), config.heads, config.head_width
    qkv = np.concatenate([tools.linear(linear, normed) for linear in (weights.q, weights.k, weights.v)], axis=1)
    beta = sigmoid(tools.linear(weights.beta, normed))
    steps = _chain((weights.decay_a, weights.decay_b), normed, tools) + weights.dt_bias
    if config.decay_floor is None:
        logarithms = softplus(steps).reshape(n_rows, heads, size) * weights.a[:, None]
    else:
        logarithms = sigmoid(steps.reshape(n_rows, heads, size) * weights.a[:, None]) * np.float32(config.decay_floor)
    decay = np.exp(logarithms)
    gate = _chain((weights.gate_a, weights.gate_b), normed, tools)
    epsilon = weights.norm.epsilon if config.unit_epsilon is None else config.unit_epsilon
    divided = Heads(heads, True, epsilon)
    out = np.empty((n_rows, heads, size), dtype=np.float32)
    for span, rows in tools.spans():
        past, state = tools.state(span)
        convolved, past = convolved_inputs(tools, qkv[rows], weights.conv1d, None, past)
        out[rows], state = _move(tools, convolved, divided, decay[rows], beta[rows], state)
        tools.store(span, (past, state))
    y = tools.normalize(out, weights.norm).reshape(n_rows, -1)
    y *= sigmoid(gate)
    return tools.linear(weights.output, y)


def _chain(linears: tuple[Linear, Linear | None], x: Float32Array, tools: Tools) -> Float32Array:
    """One projection behind the other."""
    first, second = linears
    y = tools.linear(first, x)
    return y if second is None else tools.linear(second, y)
