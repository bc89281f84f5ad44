"""Recurrent mixers between their products by compiled kernels (kernels/recurrent.py), where these fit the sizes.

Implements engine.cpu.recurrent.tools.RecurrentKernels. Must not know of layers.
"""

from __future__ import annotations

import math

import numpy as np

from engine.cpu.kernels.recurrent import CHANNELS, MOST_KEYS
from engine.cpu.products.matmul import LANES
from engine.cpu.recurrent.tools import Float32Array, Heads, Moved
from engine.cpu.steps.immediate import Immediate
from engine.cpu.steps.operands import address, float_bits
from engine.cpu.steps.protocol import Step
from engine.model.config import (
    Activation,
    DeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    RecurrentConfig,
    ShortConvConfig,
)

MOST_TAPS = 8
"""Widest convolution that a kernel is built for."""

WIDE, PAIR = 4, 2
"""Vectors that an item takes of channels and of values, where their number allows it; else one."""


def kernel_names(config: RecurrentConfig) -> list[tuple[str, str]]:
    """Kind and type of the kernels that a mixer can ask for."""
    if isinstance(config, ShortConvConfig):
        return [("convolve", _convolve_name(config.inner, config.conv_width, silu=False))]
    if isinstance(config, Mamba2Config):
        convolve = _convolve_name(config.convolved, config.conv_width, silu=True)
        return [("convolve", convolve), ("grouped_scan", "F32"), ("gate", Activation.SILU.name)]
    if isinstance(config, (DeltaNetConfig, KimiDeltaConfig)):
        channels = config.convolved if isinstance(config, DeltaNetConfig) else 3 * config.inner
        rule = _delta_name(config.head_width, per_key=isinstance(config, KimiDeltaConfig))
        convolve = _convolve_name(channels, config.conv_width, silu=True)
        return [("convolve", convolve), ("delta_rule", rule), ("gate", Activation.SILU.name)]
    return []


def _convolve_name(channels: int, taps: int, *, silu: bool) -> str:
    return f"{'SILU' if silu else 'PLAIN'}/{taps}/{WIDE if channels % (WIDE * LANES) == 0 else 1}"


def _delta_name(values: int, *, per_key: bool) -> str:
    return f"{'KEY' if per_key else 'HEAD'}/{PAIR if values % (PAIR * LANES) == 0 else 1}"


class CompiledRecurrence:
    """The kernels, run at once. Each gives None where the sizes do not fit it.

    Args:
        steps: runs them.
    """

    def __init__(self, steps: Immediate) -> None:
        self._steps = steps

    def convolve(
        self, x: Float32Array, weight: Float32Array, bias: Float32Array | None, past: Float32Array, *, silu: bool
    ) -> Moved | None:
        """See RecurrentKernels.convolve."""
        (n_tokens, channels), taps = x.shape, weight.shape[1]
        fits = channels % LANES == 0 and 2 <= taps <= MOST_TAPS and past.shape[1] == taps - 1
        if not fits or x.strides[1] != x.itemsize or not weight.flags.c_contiguous:
            return None
        out, behind, past = np.empty((n_tokens, channels), np.float32), np.empty(past.shape, np.float32), _whole(past)
        name = _convolve_name(channels, taps, silu=silu)
        arrays = address(weight), 0 if bias is None else address(bias), address(past), address(behind), address(out)
        operands = address(x), x.strides[0], *arrays, n_tokens, channels
        # The activation costs as much as some ten plain steps, and so do the weights of a channel.
        n_items = channels // (int(name[-1]) * LANES)
        step = Step("convolve", name, operands, n_items, 8 * (n_tokens + 2) * channels)
        self._steps.run(step, x, weight, bias, past, behind, out)
        return out, behind

    def delta_rule(
        self, convolved: Float32Array, heads: Heads, decay: Float32Array, beta: Float32Array, state: Float32Array
    ) -> Moved | None:
        """See RecurrentKernels.delta_rule."""
        n_tokens, (n_heads, keys, values) = len(convolved), state.shape
        if keys % LANES or values % LANES or keys > MOST_KEYS or not convolved.flags.c_contiguous:
            return None
        state, decay, beta = _whole(state), _whole(decay), _whole(beta)
        out, behind = np.empty((n_tokens, n_heads, values), np.float32), np.empty_like(state)
        first, row = address(convolved), convolved.strides[0]
        parts = (first + 4 * column for column in (0, heads.key_heads * keys, 2 * heads.key_heads * keys))
        arrays = address(decay), address(beta), address(state), address(behind), address(out)
        sizes = n_tokens, n_heads, heads.key_heads, int(heads.grouped), keys, values
        numbers = float_bits(heads.epsilon), float_bits(1.0 / math.sqrt(keys))
        name = _delta_name(values, per_key=decay.shape[2] != 1)
        operands = *parts, row, *arrays, *sizes, *numbers
        n_items = n_heads * values // (int(name[-1]) * LANES)
        step = Step("delta_rule", name, operands, n_items, (n_tokens + 1) * state.size)
        self._steps.run(step, convolved, decay, beta, state, behind, out)
        return out, behind

    def grouped_scan(
        self,
        convolved: Float32Array,
        groups: int,
        delta: Float32Array,
        a: Float32Array,
        d: Float32Array,
        state: Float32Array,
    ) -> Moved | None:
        """See RecurrentKernels.grouped_scan."""
        n_tokens, (heads, width, states) = len(convolved), state.shape
        if states % LANES or width % CHANNELS or states > MOST_KEYS or not convolved.flags.c_contiguous:
            return None
        state, delta, decay, d = _whole(state), _whole(delta), _whole(np.exp(delta * a)), _whole(d)
        out, behind = np.empty((n_tokens, heads, width), np.float32), np.empty_like(state)
        first, at_b = address(convolved), heads * width
        parts = first, first + 4 * at_b, first + 4 * (at_b + groups * states), convolved.strides[0]
        arrays = (address(array) for array in (delta, decay, d, state, behind, out))
        operands = *parts, *arrays, n_tokens, heads, groups, width, states
        step = Step("grouped_scan", "F32", operands, heads * width // CHANNELS, (n_tokens + 1) * state.size)
        self._steps.run(step, convolved, delta, decay, d, state, behind, out)
        return out, behind

    def gate(self, z: Float32Array, y: Float32Array) -> Float32Array | None:
        """See RecurrentKernels.gate."""
        if z.size % LANES or not (z.flags.c_contiguous and y.flags.c_contiguous):
            return None
        return self._steps.gate(z, y, Activation.SILU)


def _whole(array: Float32Array) -> Float32Array:
    return np.ascontiguousarray(array, dtype=np.float32)
