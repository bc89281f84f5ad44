"""Lightning attention: linear attention with a fixed decay per head (LightningConfig)."""

from __future__ import annotations

import numpy as np

from engine.cpu.recurrent.tools import Float32Array, Tools
from engine.cpu.reference import sigmoid
from engine.model.config import LightningConfig
from engine.model.weights import LightningWeights


def decayed_sum(
    q: Float32Array, k: Float32Array, v: Float32Array, decay: Float32Array, state: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """The recurrence over the tokens of one sequence: M = decay · M + k ⊗ v; y = q · M.

    Args:
        q: (T, H, S).
        k: (T, H, S).
        v: (T, H, S).
        decay: (H,).
        state: (H, S, S) M before the first token; zeros at the beginning of a sequence.

    Returns:
        y (T, H, S) and M (H, S, S) after the last token.
    """
    out = np.empty_like(v)
    state = state.copy()
    term, factor = np.empty_like(state), decay[:, None, None]
    for token in range(len(v)):
        state *= factor
        np.multiply(k[token][..., None], v[token][:, None], out=term)
        state += term
        np.multiply(state, q[token][..., None], out=term)
        np.add.reduce(term, axis=1, out=out[token])
    return out, state


def mix_lightning(
    config: LightningConfig, weights: LightningWeights, normed: Float32Array, tools: Tools
) -> Float32Array:
    """What LightningConfig says of normalized inputs (T, D), without the residual."""
    n_rows, heads, size = len(normed), config.heads, config.head_width
    qkv = tools.linear(weights.qkv, normed)
    qkv *= sigmoid(qkv)
    q, k, v = np.moveaxis(qkv.reshape(n_rows, heads, 3, size), 2, 0)
    out = np.empty((n_rows, heads, size), dtype=np.float32)
    for span, rows in tools.spans():
        (state,) = tools.state(span)
        out[rows], state = decayed_sum(q[rows], k[rows], v[rows], weights.decay, state)
        tools.store(span, (state,))
    y = tools.normalize(out.reshape(n_rows, -1), weights.norm)
    y *= sigmoid(tools.linear(weights.gate, normed))
    return tools.linear(weights.output, y)
