"""Steps of recurrent mixers as numbers that a kernel reads (kernels/recurrent.py), and which sizes the kernels fit."""

from __future__ import annotations

import math
from enum import Enum

from engine.cpu.kernels.recurrent import MOST_KEYS
from engine.cpu.kernels.scans import CHANNELS, MOST_STATES
from engine.cpu.memory import LINE
from engine.cpu.products.matmul import LANES
from engine.cpu.recurrent.tools import Heads
from engine.cpu.steps.operands import address, float_bits
from engine.cpu.steps.protocol import Float32Array, StateRow, Step
from engine.model.config import (
    Activation,
    DeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    MambaConfig,
    RecurrentConfig,
    ShortConvConfig,
)
from engine.model.weights import MambaWeights

MOST_TAPS = 8
"""Widest convolution that a kernel is built for."""

WIDE, PAIR = 4, 2
"""Vectors that an item takes of channels and of values, where their number allows it; else one."""


class After(Enum):
    """What becomes of a convolution's sums (kernels/convolution.py)."""

    PLAIN = "plain"
    SILU = "silu"
    GATED = "gated"  # between the two gates of a short convolution


def kernel_names(config: RecurrentConfig) -> list[tuple[str, str]]:
    """Kind and type of the kernels that a mixer can ask for."""
    if isinstance(config, ShortConvConfig):
        return [("convolve", _convolve_name(config.inner, config.conv_width, After.GATED))]
    gate = "gate", Activation.SILU.name
    if isinstance(config, MambaConfig):
        convolve = _convolve_name(config.inner, config.conv_width, After.SILU)
        return [("convolve", convolve), ("selective_scan", "F32"), ("take_columns", "F32")]
    if isinstance(config, Mamba2Config):
        convolve = _convolve_name(config.convolved, config.conv_width, After.SILU)
        return [("convolve", convolve), ("grouped_scan", "F32"), gate]
    if isinstance(config, (DeltaNetConfig, KimiDeltaConfig)):
        channels = config.convolved if isinstance(config, DeltaNetConfig) else 3 * config.inner
        kind = "KEY" if isinstance(config, KimiDeltaConfig) else "STEPS" if fits_delta_net(config) else "HEAD"
        convolve = _convolve_name(channels, config.conv_width, After.SILU)
        return [("convolve", convolve), ("delta_rule", _delta_name(config.head_width, kind)), gate]
    return []


def fits_convolution(channels: int, taps: int) -> bool:
    """Whether a kernel computes a convolution."""
    return channels % LANES == 0 and 2 <= taps <= MOST_TAPS


def fits_delta_rule(keys: int, values: int) -> bool:
    """Whether a kernel computes a delta rule."""
    return keys % LANES == 0 and values % LANES == 0 and keys <= MOST_KEYS


def fits_scan(width: int, states: int) -> bool:
    """Whether a kernel computes a scan of Mamba 2."""
    return states % LANES == 0 and width % CHANNELS == 0 and states <= MOST_STATES


def fits_delta_net(config: DeltaNetConfig) -> bool:
    """Whether kernels compute all of a mixer."""
    size = config.head_width
    fits = fits_delta_rule(size, size) and fits_convolution(config.convolved, config.conv_width)
    return fits and not config.sigmoid_gate


def fits_mamba(config: MambaConfig) -> bool:
    """Whether kernels compute all of a mixer."""
    fits = fits_scan(config.inner, config.state) and fits_convolution(config.inner, config.conv_width)
    return fits and config.dt_rank % LANES == 0


def fits_mamba_2(config: Mamba2Config) -> bool:
    """Whether kernels compute all of a mixer."""
    fits = fits_scan(config.head_width, config.state) and fits_convolution(config.convolved, config.conv_width)
    return fits and config.inner // config.groups % LANES == 0


def fits_short_conv(config: ShortConvConfig) -> bool:
    """Whether kernels compute all of a mixer."""
    return fits_convolution(config.inner, config.conv_width)


def convolve_step(
    x: Float32Array,
    weight: Float32Array,
    bias: Float32Array | None,
    state: StateRow,
    out: Float32Array,
    after: After,
) -> Step:
    """Convolution of rows of x (T, C), or (T, 3 · C) where `after` is GATED, into out (T, C); state: (C, W - 1)."""
    n_tokens, channels = out.shape
    name = _convolve_name(channels, weight.shape[1], after)
    arrays = address(weight), 0 if bias is None else address(bias), *state.operands, address(out)
    operands = address(x), x.strides[0], *arrays, n_tokens, channels
    # The activation costs as much as some ten plain steps, and so do the weights of a channel.
    return Step("convolve", name, operands, channels // (int(name[-1]) * LANES), 8 * (n_tokens + 2) * channels)


def delta_step(
    convolved: Float32Array,
    heads: Heads,
    decay: Float32Array,
    beta: Float32Array,
    state: StateRow,
    out: Float32Array,
    steps: tuple[Float32Array, Float32Array] | None = None,
) -> Step:
    """A delta rule of contiguous rows into out (T, H, P).

    Args:
        convolved: (T, 2 · K · S + H · P).
        heads: how they are divided.
        decay: (T, H, 1) or (T, H, S); with steps alpha, (T, H).
        beta: (T, H); with steps before the sigmoid.
        state: (H, S, P).
        out: see above.
        steps: a and dt_bias, both (H,).
    """
    n_tokens, n_heads, values = out.shape
    keys = (convolved.shape[1] - n_heads * values) // (2 * heads.key_heads)
    first, row = address(convolved), convolved.strides[0]
    parts = (first + 4 * column for column in (0, heads.key_heads * keys, 2 * heads.key_heads * keys))
    arrays = address(decay), address(beta), *state.operands, address(out)
    sizes = n_tokens, n_heads, heads.key_heads, int(heads.grouped), keys, values
    numbers = float_bits(heads.epsilon), float_bits(1.0 / math.sqrt(keys))
    name = _delta_name(values, "STEPS" if steps else "HEAD" if decay.shape[-1] == 1 else "KEY")
    operands = *parts, row, *arrays, *sizes, *numbers, *((0, 0) if steps is None else map(address, steps))
    items = n_heads * values // (int(name[-1]) * LANES)
    return Step("delta_rule", name, operands, items, (n_tokens + 1) * n_heads * keys * values)


def scan_step(
    convolved: Float32Array,
    groups: int,
    steps: Float32Array,
    z: Float32Array,
    constants: tuple[Float32Array, Float32Array, Float32Array],
    state: StateRow,
    out: Float32Array,
) -> Step:
    """A scan of Mamba 2 of contiguous rows (T, H · P + 2 · G · S) into out (T, H, P), gated by z; state: (H, P, S).

    Args:
        convolved: see above.
        groups: G.
        steps: (T, H), before the bias and softplus.
        z: (T, H · P), whose rows are as far apart.
        constants: a, d and dt_bias, (H,) each.
        state: see above.
        out: see above.
    """
    n_tokens, heads, width = out.shape
    at_b = heads * width
    states = (convolved.shape[1] - at_b) // (2 * groups)
    first = address(convolved)
    parts = first, first + 4 * at_b, first + 4 * (at_b + groups * states), convolved.strides[0]
    assert z.strides == steps.strides
    assert state.operands[0] % LINE == 0
    inputs = address(steps), address(z), z.strides[0], *map(address, constants)
    operands = *parts, *inputs, *state.operands, address(out), n_tokens, heads, groups, width, states
    return Step("grouped_scan", "F32", operands, heads * width // CHANNELS, (n_tokens + 1) * heads * width * states)


def selective_step(
    u: Float32Array,
    steps: Float32Array,
    parts: tuple[Float32Array, Float32Array],
    weights: MambaWeights,
    z: Float32Array,
    state: StateRow,
    out: Float32Array,
) -> Step:
    """A scan of Mamba 1 of contiguous rows u into out, gated by z, all (T, I); state: (I, S).

    Args:
        u: see above.
        steps: (T, I) without gaps, before softplus.
        parts: b and c, (T, S) each, whose rows are equally far apart.
        weights: of the mixer.
        z: (T, I).
        state: see above.
        out: see above.
    """
    n_tokens, inner = out.shape
    b, c = parts
    assert b.strides == c.strides
    inputs = address(u), address(steps), address(b), address(c), b.strides[0], address(weights.a), address(weights.d)
    arrays = address(z), z.strides[0], *state.operands, address(out)
    # A state takes an exponential, which costs as much as some ten plain steps.
    floats = 8 * n_tokens * weights.a.size
    return Step("selective_scan", "F32", (*inputs, *arrays, n_tokens, *weights.a.shape), inner // CHANNELS, floats)


def _convolve_name(channels: int, taps: int, after: After) -> str:
    return f"{after.name}/{taps}/{WIDE if channels % (WIDE * LANES) == 0 else 1}"


def _delta_name(values: int, kind: str) -> str:
    return f"{kind}/{PAIR if values % (PAIR * LANES) == 0 else 1}"
