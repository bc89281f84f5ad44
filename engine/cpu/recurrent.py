"""Recurrent mixers in plain numpy, float32 throughout: the reference of short convolutions and selective scans.

Pure functions of arrays. Every token of a sequence is one step with the same operations in the same order, so its bits
depend on the state before it alone: not on how a prompt was cut into pieces, nor on the rest of the batch. Letters:
T tokens of one sequence, I channels, S states of a channel, W width of a convolution.
"""

from __future__ import annotations

import numpy as np

from engine.cpu.reference import Float32Array, sigmoid

SOFTPLUS_LIMIT = 20.0
"""Beyond it softplus(x) is x in float32."""


def short_convolution(
    x: Float32Array, weight: Float32Array, bias: Float32Array, past: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """Weighted sum of the last W inputs of every channel.

    Args:
        x: (T, I) inputs.
        weight: (I, W), the newest input's last.
        bias: (I,).
        past: (I, W - 1) the inputs before x, oldest first; zeros at the beginning of a sequence.

    Returns:
        (T, I), and the (I, W - 1) inputs that the next token needs.
    """
    n_tokens, width = len(x), weight.shape[1]
    inputs = np.concatenate((past.T, x))
    out = inputs[:n_tokens] * weight[:, 0]
    for place in range(1, width):
        out += inputs[place : place + n_tokens] * weight[:, place]
    out += bias
    return out, np.ascontiguousarray(inputs[n_tokens:].T)


def softplus(x: Float32Array) -> Float32Array:
    """log(1 + exp(x))."""
    y: Float32Array = np.where(x > SOFTPLUS_LIMIT, x, np.log1p(np.exp(np.minimum(x, np.float32(SOFTPLUS_LIMIT)))))
    return y


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


def gated_output(y: Float32Array, u: Float32Array, d: Float32Array, z: Float32Array) -> Float32Array:
    """(y + d · u) · silu(z), all (T, I) but d (I,)."""
    out = y + u * d
    out *= z * sigmoid(z)
    return out
