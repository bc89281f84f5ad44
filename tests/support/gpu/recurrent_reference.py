"""A float64 reference of a Mamba layer between its products, and random layers to compare the kernels on."""

from dataclasses import dataclass

import numpy as np


@dataclass
class MambaWeights:
    """Random float32 weights: conv (E, W), bias (E,), a (E, N), d (E,)."""

    conv: np.ndarray
    bias: np.ndarray
    a: np.ndarray
    d: np.ndarray

    @classmethod
    def random(cls, rng, d_inner, d_state, d_conv):
        conv, bias = rng.normal(size=(d_inner, d_conv)) / d_conv**0.5, rng.normal(size=d_inner)
        a = -rng.uniform(0.05, 4.0, (d_inner, d_state))
        return cls(*(array.astype(np.float32) for array in (conv, bias, a, rng.normal(size=d_inner))))


def silu64(x):
    return x / (1.0 + np.exp(-x))


def convolve64(weights, past, x):
    """Inputs x (T, E) behind those of `past` (E, W - 1): silu of the convolution (T, E), and the past behind them."""
    rows = np.concatenate([past.T, x]).astype(np.float64)
    width = weights.conv.shape[1]
    sums = sum(rows[i : i + len(x)] * weights.conv[:, i].astype(np.float64) for i in range(width))
    return silu64(sums + weights.bias), rows[len(x) :].T


def scan64(weights, state, dt, x, b, c, z):
    """dt, x, z (T, E), b and c (T, N), state (E, N): outputs (T, E), and the state behind them."""
    h, a, d, out = state.astype(np.float64), weights.a.astype(np.float64), weights.d.astype(np.float64), []
    dt, x, b, c, z = (array.astype(np.float64) for array in (dt, x, b, c, z))
    for t in range(len(dt)):
        step = np.logaddexp(0.0, dt[t])
        h = np.exp(step[:, None] * a) * h + (step * x[t])[:, None] * b[t]
        out.append((h @ c[t] + d * x[t]) * silu64(z[t]))
    return np.array(out), h
