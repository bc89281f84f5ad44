"""The state space of PLaMo 2 (Plamo2Config)."""

from __future__ import annotations

import numpy as np

from engine.cpu.recurrent.mamba import convolve_sequences, gated_output
from engine.cpu.recurrent.mamba_2 import grouped_scan
from engine.cpu.recurrent.tools import Float32Array, Tools, softplus
from engine.model.config import Plamo2Config
from engine.model.weights import Plamo2Weights


def mix_plamo_2(config: Plamo2Config, weights: Plamo2Weights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What Plamo2Config says of normalized inputs (T, D), without the residual."""
    n_rows, inner, heads = len(normed), config.inner, config.heads
    both = tools.linear(weights.ssm_in, normed).reshape(n_rows, heads, 2, config.head_width)
    u, pasts = convolve_sequences(both[:, :, 1].reshape(n_rows, inner), weights.conv1d, None, tools)
    parts = np.split(tools.linear(weights.ssm_x, u), (config.state, 2 * config.state), axis=1)
    norms = (weights.b_norm, weights.c_norm, weights.dt_norm)
    b, c, d = (tools.normalize(part, norm) for part, norm in zip(parts, norms, strict=True))
    delta = softplus(tools.linear(weights.ssm_dt, d))
    by_head = u.reshape(n_rows, heads, config.head_width)
    out = np.empty_like(by_head)
    for (span, rows), past in zip(tools.spans(), pasts, strict=True):
        _, state = tools.state(span)
        inputs = by_head[rows], delta[rows], weights.a, b[rows, None], c[rows, None]
        out[rows], state = grouped_scan(*inputs, state)
        tools.store(span, (past, state))
    y = gated_output(out, by_head, weights.d[:, None], both[:, :, 0])
    return tools.linear(weights.ssm_out, y.reshape(n_rows, inner))
