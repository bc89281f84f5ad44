"""Mamba 2: state spaces with one decay per head (Mamba2Config)."""

from __future__ import annotations

import numpy as np

from engine.cpu.recurrent.convolution import convolved_inputs
from engine.cpu.recurrent.tools import Float32Array, Moved, Tools, softplus
from engine.model.config import Mamba2Config
from engine.model.weights import Mamba2Weights


def grouped_scan(
    u: Float32Array, delta: Float32Array, a: Float32Array, b: Float32Array, c: Float32Array, state: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """The recurrence of Mamba 2 over the tokens of one sequence: h = exp(Δ · a) · h + (Δ · u) ⊗ B; y = h · C.

    Args:
        u: (T, H, P) inputs.
        delta: (T, H) step sizes Δ, after softplus.
        a: (H,), negative in trained models.
        b: (T, G, S); H / G heads share each.
        c: (T, G, S).
        state: (H, P, S) h before the first token; zeros at the beginning of a sequence.

    Returns:
        y (T, H, P) and h (H, P, S) after the last token.
    """
    n_tokens, heads, width = u.shape
    groups, size = b.shape[1:]
    out = np.empty((n_tokens, groups, heads // groups, width), dtype=np.float32)
    state = state.reshape(groups, heads // groups, width, size).copy()
    term = np.empty_like(state)
    decay = np.exp(delta * a).reshape(n_tokens, groups, -1, 1, 1)
    scaled = (u * delta[..., None]).reshape(n_tokens, groups, -1, width, 1)
    for token in range(n_tokens):
        state *= decay[token]
        np.multiply(scaled[token], b[token][:, None, None], out=term)
        state += term
        np.multiply(state, c[token][:, None, None], out=term)
        np.add.reduce(term, axis=-1, out=out[token])
    return out.reshape(u.shape), state.reshape(heads, width, size)


def scan_heads(
    convolved: Float32Array,
    groups: int,
    delta: Float32Array,
    a: Float32Array,
    d: Float32Array,
    state: Float32Array,
) -> Moved:
    """grouped_scan of rows [u, b of the groups, c of them], with d · u added to y.

    Args:
        convolved: (T, H · P + 2 · G · S).
        groups: G.
        delta: (T, H).
        a: (H,).
        d: (H,).
        state: (H, P, S) before the first token.
    """
    heads, width, size = state.shape
    u, b, c = np.split(convolved, (heads * width, heads * width + groups * size), axis=1)
    u, b, c = u.reshape(-1, heads, width), b.reshape(-1, groups, size), c.reshape(-1, groups, size)
    y, state = grouped_scan(u, delta, a, b, c, state)
    y += u * d[:, None]
    return y, state


def mix_mamba_2(config: Mamba2Config, weights: Mamba2Weights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What Mamba2Config says of normalized inputs (T, D), without the residual."""
    n_rows, inner, groups = len(normed), config.inner, config.groups
    ends = (inner, inner + config.convolved)
    z, v, d = np.split(tools.linear(weights.ssm_in, normed), ends, axis=1)
    delta = softplus(d + weights.dt_bias)
    out = np.empty((n_rows, config.heads, config.head_width), dtype=np.float32)
    for span, rows in tools.spans():
        past, state = tools.state(span)
        convolved, past = convolved_inputs(tools, v[rows], weights.conv1d, weights.conv1d_bias, past)
        out[rows], state = scan_heads(convolved, groups, delta[rows], weights.a, weights.d, state)
        tools.store(span, (past, state))
    y = tools.gated(out.reshape(n_rows, inner), np.ascontiguousarray(z))
    y = tools.normalize(y.reshape(n_rows, groups, -1), weights.norm).reshape(n_rows, inner)
    return tools.linear(weights.ssm_out, y)
