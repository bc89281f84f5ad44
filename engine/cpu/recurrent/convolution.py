"""Convolutions over the last few inputs of every channel, and the mixer made of one (ShortConvConfig)."""

from __future__ import annotations

import numpy as np

from engine.cpu.recurrent.tools import Float32Array, Moved, Tools
from engine.cpu.reference import sigmoid
from engine.model.config import ShortConvConfig
from engine.model.weights import ShortConvWeights


def short_convolution(
    x: Float32Array, weight: Float32Array, bias: Float32Array | None, past: Float32Array, dilation: int = 1
) -> tuple[Float32Array, Float32Array]:
    """Weighted sum of the last W inputs of every channel, `dilation` tokens apart.

    Args:
        x: (T, I) inputs.
        weight: (I, W), the newest input's last.
        bias: (I,) or None.
        past: (I, (W - 1) · dilation) the inputs before x, oldest first; zeros at the beginning of a sequence.
        dilation: see above.

    Returns:
        (T, I), and the (I, (W - 1) · dilation) inputs that the next token needs.
    """
    n_tokens, width = len(x), weight.shape[1]
    inputs = np.concatenate((past.T, x))
    out = inputs[:n_tokens] * weight[:, 0]
    for place in range(1, width):
        out += inputs[place * dilation : place * dilation + n_tokens] * weight[:, place]
    if bias is not None:
        out += bias
    return out, np.ascontiguousarray(inputs[n_tokens:].T)


def convolved_inputs(
    tools: Tools, x: Float32Array, weight: Float32Array, bias: Float32Array | None, past: Float32Array
) -> Moved:
    """silu of short_convolution, with its second result."""
    kernels = tools.kernels
    found = None if kernels is None else kernels.convolve(x, weight, bias, past, silu=True)
    if found is None:
        out, behind = short_convolution(x, weight, bias, past)
        out *= sigmoid(out)
        found = out, behind
    return found


def mix_short_conv(
    config: ShortConvConfig, weights: ShortConvWeights, normed: Float32Array, tools: Tools
) -> Float32Array:
    """What ShortConvConfig says of normalized inputs (T, D), without the residual."""
    b, c, u = np.split(tools.linear(weights.in_proj, normed), 3, axis=1)
    gated = b * u
    out = np.empty_like(gated)
    for span, rows in tools.spans():
        (past,) = tools.state(span)
        kernels = tools.kernels
        found = None if kernels is None else kernels.convolve(gated[rows], weights.conv, None, past, silu=False)
        out[rows], past = found or short_convolution(gated[rows], weights.conv, None, past)
        tools.store(span, (past,))
    out *= c
    return tools.linear(weights.out_proj, out)
