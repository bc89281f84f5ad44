"""Mamba 1: selective scans (MambaConfig)."""

from __future__ import annotations

import numpy as np

from engine.cpu.recurrent.convolution import short_convolution
from engine.cpu.recurrent.tools import Float32Array, Tools, softplus
from engine.cpu.reference import sigmoid
from engine.model.config import MambaConfig
from engine.model.weights import MambaWeights


def selective_scan(
    u: Float32Array, delta: Float32Array, a: Float32Array, b: Float32Array, c: Float32Array, state: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """The recurrence of Mamba 1 over the tokens of one sequence.

    h = h · exp(Δ · a) + (Δ · u) ⊗ b; y = h · c.

    Args:
        u: (T, I) inputs.
        delta: (T, I) step sizes Δ, after softplus.
        a: (I, S), negative in trained models.
        b: (T, S).
        c: (T, S).
        state: (I, S) h before the first token; zeros at the beginning of a sequence.

    Returns:
        y (T, I) and h (I, S) after the last token.
    """
    out = np.empty_like(u)
    scaled = delta * u
    state, decay = state.copy(), np.empty_like(state)
    for token in range(len(u)):
        np.multiply(delta[token, :, None], a, out=decay)
        np.exp(decay, out=decay)
        state *= decay
        np.multiply(scaled[token, :, None], b[token], out=decay)
        state += decay
        np.multiply(state, c[token], out=decay)
        np.add.reduce(decay, axis=1, out=out[token])
    return out, state


def convolve_sequences(
    u: Float32Array, weight: Float32Array, bias: Float32Array | None, tools: Tools
) -> tuple[Float32Array, list[Float32Array]]:
    """silu of short_convolution over the rows u (T, I) of each sequence; the first of a layer's states are its inputs.

    Returns:
        (T, I), and for each sequence the inputs that its next token needs. They are not stored.
    """
    convolved, pasts = np.empty(u.shape, dtype=np.float32), []
    for span, rows in tools.spans():
        convolved[rows], past = short_convolution(u[rows], weight, bias, tools.state(span)[0])
        pasts.append(past)
    convolved *= sigmoid(convolved)
    return convolved, pasts


def gated_output(y: Float32Array, u: Float32Array, d: Float32Array, z: Float32Array) -> Float32Array:
    """(y + d · u) · silu(z), all (T, I) or (T, H, P), but d (I,) or (H, 1)."""
    out = y + u * d
    out *= z * sigmoid(z)
    return out


def mix_mamba(config: MambaConfig, weights: MambaWeights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What MambaConfig says of normalized inputs (T, D), without the residual."""
    both = tools.linear(weights.ssm_in, normed)
    u, z = both[:, : config.inner], both[:, config.inner :]
    u, pasts = convolve_sequences(u, weights.conv1d, weights.conv1d_bias, tools)
    parts = np.split(tools.linear(weights.ssm_x, u), (config.dt_rank, config.dt_rank + config.state), axis=1)
    norms = (weights.dt_norm, weights.b_norm, weights.c_norm)
    dt, b, c = (tools.normalize(part, norm) for part, norm in zip(parts, norms, strict=True))
    delta = softplus(tools.linear(weights.ssm_dt, np.ascontiguousarray(dt)))
    out = np.empty_like(u)
    for (span, rows), past in zip(tools.spans(), pasts, strict=True):
        _, state = tools.state(span)
        out[rows], state = selective_scan(u[rows], delta[rows], weights.a, b[rows], c[rows], state)
        tools.store(span, (past, state))
    return tools.linear(weights.ssm_out, gated_output(out, u, weights.d, z))
