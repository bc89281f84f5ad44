"""Recurrent mixers made of compiled steps: the formulas of engine/cpu/recurrent up to a mixer's last product.

Each function gets normalized inputs (T, D) and, for every sequence of the step, its rows and its states.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cpu.recurrent.tools import Heads
from engine.cpu.steps.protocol import Float32Array, StateRow, Steps
from engine.cpu.steps.recurrent_steps import After, convolve_step, delta_step, scan_step, selective_step
from engine.model.batch import Span
from engine.model.config import (
    Activation,
    DeltaNetConfig,
    Mamba2Config,
    MambaConfig,
    RecurrentConfig,
    ShortConvConfig,
)
from engine.model.weights import (
    DeltaNetWeights,
    Linear,
    Mamba2Weights,
    MambaWeights,
    RecurrentWeights,
    ShortConvWeights,
)

Places = list[tuple[slice, list[StateRow]]]
"""Rows and states of the step's sequences."""


def recur(
    steps: Steps,
    config: RecurrentConfig | None,
    weights: RecurrentWeights,
    normed: Float32Array,
    spans: Sequence[Span],
    states: Sequence[list[StateRow]],
) -> tuple[Float32Array, Linear]:
    """What the last product of a mixer reads (T, M), and that product.

    Args:
        steps: compute, or are recorded.
        config: of a mixer that plain.plain_recurrent accepts.
        weights: of the mixer.
        normed: (T, D).
        spans: the step's sequences.
        states: of each of them, array by array.
    """
    places = [(span.rows, state) for span, state in zip(spans, states, strict=True)]
    if isinstance(config, ShortConvConfig) and isinstance(weights, ShortConvWeights):
        return _short_conv(steps, weights, normed, places), weights.out_proj
    if isinstance(config, MambaConfig) and isinstance(weights, MambaWeights):
        return _mamba(steps, config, weights, normed, places), weights.ssm_out
    if isinstance(config, Mamba2Config) and isinstance(weights, Mamba2Weights):
        return _mamba_2(steps, config, weights, normed, places), weights.ssm_out
    assert isinstance(config, DeltaNetConfig)
    assert isinstance(weights, DeltaNetWeights)
    return _delta_net(steps, config, weights, normed, places), weights.ssm_out


def _short_conv(steps: Steps, weights: ShortConvWeights, normed: Float32Array, places: Places) -> Float32Array:
    """ShortConvConfig's formula."""
    whole = steps.linear("conv_in", normed, weights.in_proj)
    steps.join()
    return _convolve(steps, whole, weights.conv, None, places, After.GATED)


def _mamba(
    steps: Steps, config: MambaConfig, weights: MambaWeights, normed: Float32Array, places: Places
) -> Float32Array:
    """MambaConfig's 1. to 5."""
    n_rows, inner, rank, size = len(normed), config.inner, config.dt_rank, config.state
    both = steps.linear("mamba_in", normed, weights.ssm_in)
    steps.join()
    u = _convolve(steps, both[:, :inner], weights.conv1d, weights.conv1d_bias, places)
    x = steps.linear("mamba_x", u, weights.ssm_x)
    steps.join()
    norms = {"dt": weights.dt_norm, "b": weights.b_norm, "c": weights.c_norm}
    first, parts = 0, []
    for (name, norm), width in zip(norms.items(), (rank, size, size), strict=True):
        part = x[:, first : first + width]
        if norm is not None:  # which reads columns of its own
            part = steps.take_columns(f"mamba_{name}", x.reshape(n_rows, 1, -1), first, width)
        parts.append(part)
        first += width
    steps.join()
    dt, b, c = (
        part if norm is None else steps.normalize(f"mamba_{name}_normed", part, norm)
        for (name, norm), part in zip(norms.items(), parts, strict=True)
    )
    steps.join()
    delta = steps.linear("mamba_steps", dt, weights.ssm_dt)
    steps.join()
    out = steps.empty("moved", (n_rows, inner))
    for rows, (_, memory) in places:
        inputs = u[rows], delta[rows], (b[rows], c[rows])
        step = selective_step(*inputs, weights, both[rows, inner:], memory, out[rows])
        steps.recur(step, out[rows], inputs, weights, both, memory)
    steps.join()
    return out


def _mamba_2(
    steps: Steps, config: Mamba2Config, weights: Mamba2Weights, normed: Float32Array, places: Places
) -> Float32Array:
    """Mamba2Config's 1. to 3."""
    n_rows, inner, end = len(normed), config.inner, config.inner + config.convolved
    whole = steps.linear("mamba_in", normed, weights.ssm_in)
    steps.join()
    convolved = _convolve(steps, whole[:, inner:end], weights.conv1d, weights.conv1d_bias, places)
    out = steps.empty("moved", (n_rows, config.heads, config.head_width))
    constants = weights.a, weights.d, weights.dt_bias
    for rows, (_, memory) in places:
        inputs = convolved[rows], config.groups, whole[rows, end:], whole[rows, :inner]
        steps.recur(scan_step(*inputs, constants, memory, out[rows]), out[rows], inputs, constants, memory)
    steps.join()
    if weights.norm is None:
        return out.reshape(n_rows, inner)
    y = steps.normalize("moved_normed", out.reshape(n_rows, config.groups, -1), weights.norm)
    steps.join()
    return y.reshape(n_rows, inner)


def _delta_net(
    steps: Steps, config: DeltaNetConfig, weights: DeltaNetWeights, normed: Float32Array, places: Places
) -> Float32Array:
    """DeltaNetConfig's 1. to 4."""
    named = {"qkv": weights.qkv, "z": weights.z, "beta": weights.beta, "alpha": weights.alpha}
    qkv, z, beta, alpha = (steps.linear(f"delta_{name}", normed, one) for name, one in named.items())
    steps.join()
    convolved = _convolve(steps, qkv, weights.conv1d, None, places)
    out = steps.empty("moved", (len(normed), config.heads, config.head_width))
    heads, constants = Heads(config.key_heads, config.grouped, weights.norm.epsilon), (weights.a, weights.dt_bias)
    for rows, (_, memory) in places:
        inputs = convolved[rows], heads, alpha[rows], beta[rows]
        steps.recur(delta_step(*inputs, memory, out[rows], constants), out[rows], inputs, constants, memory)
    steps.join()
    y = steps.normalize("moved_normed", out, weights.norm)
    steps.join()
    gated = steps.gate(z, y, Activation.SILU)
    steps.join()
    return gated


def _convolve(
    steps: Steps,
    x: Float32Array,
    weight: Float32Array,
    bias: Float32Array | None,
    places: Places,
    after: After = After.SILU,
) -> Float32Array:
    """The convolution (T, C) of every sequence's rows of x; the first array of a state has what came before."""
    out = steps.empty("convolved", (len(x), len(weight)))
    for rows, (past, *_) in places:
        steps.recur(convolve_step(x[rows], weight, bias, past, out[rows], after), out[rows], x, weight, bias, past)
    steps.join()
    return out
