"""The functions between products that kernels know by number."""

from __future__ import annotations

from enum import IntEnum


class KernelActivation(IntEnum):
    """Elementwise function of the output; with a paired matrix, of the gate: out = f(gate) * up."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    RELU = 3
    RELU_SQUARED = 4
    SWIGLU_CLAMPED = 5  # also clamps `up`, so no epilogue can fuse it
    XIELU = 6  # these two have constants, which only rows.gate takes
    SITU = 7
