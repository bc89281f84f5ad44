"""The state space of PLaMo 2 (Plamo2Config)."""

from __future__ import annotations

import numpy as np

from engine.cpu.recurrent.convolution import short_convolution
from engine.cpu.recurrent.mamba_2 import grouped_scan
from engine.cpu.recurrent.tools import Float32Array, Tools, softplus
from engine.cpu.reference import sigmoid
from engine.model.config import Plamo2Config
from engine.model.weights import Plamo2Weights


def mix_plamo_2(config: Plamo2Config, weights: Plamo2Weights, normed: Float32Array, tools: Tools) -> Float32Array:
    """What Plamo2Config says of normalized inputs (T, D), without the residual."""
    n_rows, inner, heads = len(normed), config.inner, config.heads
    both = tools.linear(weights.ssm_in, normed).reshape(n_rows, heads, 2, config.head_width)
    z, u = (both[:, :, part].reshape(n_rows, inner) for part in (0, 1))
    convolved, pasts = np.empty((n_rows, inner), dtype=np.float32), []
    for span, rows in tools.spans():
        past, _ = tools.state(span)
        convolved[rows], past = short_convolution(u[rows], weights.conv1d, None, past)
        pasts.append(past)
    u = convolved * sigmoid(convolved)
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
    out += by_head * weights.d[:, None]
    y = out.reshape(n_rows, inner)
    y *= z * sigmoid(z)
    return tools.linear(weights.ssm_out, y)
