"""What recurrent mixers compute between their products, by compiled kernels run at once, where these fit the sizes.

Implements engine.cpu.recurrent.tools.RecurrentKernels. Must not know of layers.
"""

from __future__ import annotations

import numpy as np

from engine.cpu.products.matmul import LANES
from engine.cpu.recurrent.tools import Float32Array, Heads, Moved
from engine.cpu.steps.immediate import Immediate
from engine.cpu.steps.protocol import StateRow
from engine.cpu.steps.recurrent_steps import (
    After,
    convolve_step,
    delta_step,
    fits_convolution,
    fits_delta_rule,
)
from engine.model.config import Activation


class CompiledRecurrence:
    """The kernels. Each gives None where the sizes do not fit it.

    Args:
        steps: runs them.
    """

    def __init__(self, steps: Immediate) -> None:
        self._steps = steps

    def convolve(
        self, x: Float32Array, weight: Float32Array, bias: Float32Array | None, past: Float32Array, *, silu: bool
    ) -> Moved | None:
        """See RecurrentKernels.convolve."""
        fits = fits_convolution(*weight.shape) and past.shape[1] == weight.shape[1] - 1
        if not fits or x.strides[1] != x.itemsize or not weight.flags.c_contiguous:
            return None
        out, behind, past = np.empty(x.shape, np.float32), np.empty(past.shape, np.float32), _whole(past)
        state = _between(past, behind)
        step = convolve_step(x, weight, bias, state, out, After.SILU if silu else After.PLAIN)
        self._steps.run(step, x, weight, bias, state, out)
        return out, behind

    def delta_rule(
        self, convolved: Float32Array, heads: Heads, decay: Float32Array, beta: Float32Array, state: Float32Array
    ) -> Moved | None:
        """See RecurrentKernels.delta_rule."""
        n_heads, keys, values = state.shape
        if not fits_delta_rule(keys, values) or not convolved.flags.c_contiguous:
            return None
        state, decay, beta = _whole(state), _whole(decay), _whole(beta)
        out, behind = np.empty((len(convolved), n_heads, values), np.float32), np.empty_like(state)
        moved = _between(state, behind)
        step = delta_step(convolved, heads, decay, beta, moved, out)
        self._steps.run(step, convolved, decay, beta, moved, out)
        return out, behind

    def gate(self, z: Float32Array, y: Float32Array) -> Float32Array | None:
        """See RecurrentKernels.gate."""
        if z.size % LANES or not (z.flags.c_contiguous and y.flags.c_contiguous):
            return None
        return self._steps.gate(z, y, Activation.SILU)


def _between(read: Float32Array, written: Float32Array) -> StateRow:
    """A state that is read from one array and written to another."""
    return StateRow(written, read, np.array([-1, 0], np.int64))


def _whole(array: Float32Array) -> Float32Array:
    return np.ascontiguousarray(array, dtype=np.float32)
