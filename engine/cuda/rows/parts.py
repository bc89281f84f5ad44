"""Launchers of parts.cu: parts of a model that only some families have, each as a row kernel of its own.

What most models have is folded into the products and the attention kernels. Letters: T rows, D columns. A row's bits
depend on nothing but the row. Must not know of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.cuda.driver.arrays import Argument, DeviceArray
from engine.cuda.driver.compiler import Kernel, build
from engine.cuda.driver.launch import launch

FILES = ("parts.cu",)


@dataclass(frozen=True, eq=False)
class DeviceNorm:
    """A normalization on the device.

    Attributes:
        centered: LayerNorm: the mean is taken off first; else RMSNorm.
        epsilon: added to the mean of the squares.
        weight: float32 (D,), or None. bias: likewise. With several heads of their own weights (heads * Hd,).
    """

    centered: bool
    epsilon: float
    weight: DeviceArray | None
    bias: DeviceArray | None

    @property
    def folds(self) -> bool:
        """Whether products apply it themselves, to what they read."""
        return not self.centered and self.weight is not None and self.bias is None


@dataclass(frozen=True, eq=False)
class DeviceRope:
    """Rotation by position * inv_freq.

    Attributes:
        n_rot: leading elements that turn.
        halves: pairs (i, i + n_rot / 2), else neighbours.
        inv_freq: float64 (n_rot / 2,) on the device; None where n_rot is 0.
        scale: factor of cos and sin.
    """

    n_rot: int
    halves: bool
    inv_freq: DeviceArray | None
    scale: float


NO_ROPE = DeviceRope(0, False, None, 1.0)
"""Turns nothing."""


def _kernel(name: str) -> Kernel:
    return build(FILES).get(name)


def _flat(name: str, x: DeviceArray, *args: Argument) -> None:
    assert x.flags.c_contiguous
    launch(_kernel(name), max(1, min(1024, -(-x.size // 256))), 256, (x, np.int64(x.size), *args))


def normalize(
    x: DeviceArray,
    out: DeviceArray,
    norm: DeviceNorm,
    *,
    pieces: int = 1,
    own_weights: bool = False,
    scale: float = 1.0,
    add: bool = False,
) -> None:
    """out = or += scale * norm(x).

    Args:
        x: float32 (T, pieces * D), rows contiguous; every piece is normalized alone.
        out: float32 of the same shape, may be x.
        norm: the normalization; its weight has D elements, with own_weights pieces * D.
        pieces: heads of a row.
        own_weights: every piece has weights of its own.
        scale: factor of the result.
        add: add to out.
    """
    columns = int(x.shape[1]) // pieces
    assert x.shape == out.shape and columns * pieces == x.shape[1] and x.strides[1] == out.strides[1] == 4
    for vector in (norm.weight, norm.bias):
        assert vector is None or vector.size == (columns * pieces if own_weights else columns)
    launch(
        _kernel("normalize_pieces"),
        (int(x.shape[0]), pieces),
        256,
        (
            x,
            x.strides[0] // 4,
            columns,
            out,
            out.strides[0] // 4,
            columns,
            columns,
            int(norm.centered),
            norm.weight,
            norm.bias,
            columns if own_weights else 0,
            float(norm.epsilon),
            float(scale),
            int(add),
        ),
    )


def rotate(x: DeviceArray, out: DeviceArray, rope: DeviceRope, positions: DeviceArray) -> None:
    """out = x with the leading elements of every piece turned; without a rotation a copy.

    Args:
        x: float32 (T, pieces, D), any strides of rows and pieces.
        out: the same shape; x itself, or apart from it.
        rope: the rotation.
        positions: int32 (T,); rows with -1 are left alone.
    """
    assert x.shape == out.shape and x.strides[2] == out.strides[2] == 4 and rope.n_rot <= x.shape[2]
    launch(
        _kernel("rotate_pieces"),
        (int(x.shape[0]), int(x.shape[1])),
        64,
        (
            x,
            x.strides[0] // 4,
            x.strides[1] // 4,
            out,
            out.strides[0] // 4,
            out.strides[1] // 4,
            int(x.shape[2]),
            rope.n_rot,
            int(rope.halves),
            positions,
            rope.inv_freq,
            float(rope.scale),
        ),
    )


def clamp(x: DeviceArray, limit: float) -> None:
    """x limited to [-limit, limit], in place; float32, contiguous."""
    _flat("clamp", x, float(limit))


def softcap(x: DeviceArray, limit: float) -> None:
    """x = limit * tanh(x / limit) in place; float32, contiguous."""
    _flat("softcap", x, float(limit))


def clear(x: DeviceArray) -> None:
    """x = 0; float32, contiguous."""
    _flat("clear", x)


def multiply_gate(x: DeviceArray, gate: DeviceArray, *, softplus: bool = False) -> None:
    """x (T, D) *= f(gate (T, G)) in place, each number of the gate for D / G columns.

    float32, x contiguous, rows of gate contiguous. f: the sigmoid, or with softplus ln(1 + exp).
    """
    columns, gates = int(x.shape[1]), int(gate.shape[1])
    assert x.shape[0] == gate.shape[0] and columns % gates == 0 and gate.strides[1] == 4
    _flat("multiply_gate", x, columns, gate, gate.strides[0] // 4, columns // gates, int(softplus))


def scale(x: DeviceArray, factor: float) -> None:
    """x *= factor in place; float32, contiguous."""
    _flat("scale", x, float(factor))


def add_times(x: DeviceArray, y: DeviceArray, factor: float) -> None:
    """x += factor * y in place; float32, contiguous, of one size."""
    assert x.size == y.size and y.flags.c_contiguous
    _flat("add_times", x, y, float(factor))


def silence(x: DeviceArray, first: int, end: int) -> None:
    """Columns first .. end - 1 of x (T, D) become the least float32; float32, contiguous."""
    _flat("silence", x, int(x.shape[1]), first, end)


def divide(x: DeviceArray, divisors: DeviceArray) -> None:
    """x (T, D) /= divisors (D,) in place; float32, contiguous."""
    assert x.shape[1] == divisors.size
    _flat("divide", x, int(x.shape[1]), divisors)


def add_chosen(total: DeviceArray, y: DeviceArray, ids: DeviceArray, weights: DeviceArray | None, expert: int) -> None:
    """total (T, D) += weights[t, k] * y (T, D) for rows with ids[t, k] == expert.

    Args:
        total: float32, contiguous.
        y: float32, contiguous.
        ids: int32 (T, U), contiguous: experts of each row, each at most once.
        weights: float32 (T, U), contiguous; None: of 1.
        expert: whose output y is.
    """
    assert total.flags.c_contiguous and y.flags.c_contiguous and total.shape == y.shape
    assert ids.flags.c_contiguous
    assert weights is None or (weights.flags.c_contiguous and ids.shape == weights.shape)
    args = (total, y, int(y.shape[1]), ids, weights, int(ids.shape[1]), expert)
    launch(_kernel("add_chosen"), int(y.shape[0]), 256, args)


def weigh_chosen_rows(x: DeviceArray, out: DeviceArray, ids: DeviceArray, weights: DeviceArray, expert: int) -> None:
    """out (T, D) = weights[t, k] * x (T, D) for rows with ids[t, k] == expert, else 0; arrays as in add_chosen()."""
    assert x.flags.c_contiguous and out.flags.c_contiguous and x.shape == out.shape
    assert ids.flags.c_contiguous and weights.flags.c_contiguous and ids.shape == weights.shape
    args = (x, out, int(x.shape[1]), ids, weights, int(ids.shape[1]), expert)
    launch(_kernel("weigh_chosen_rows"), int(x.shape[0]), 256, args)


def thin_out(x: DeviceArray, deviations: float) -> None:
    """x (T, D) = what exceeds the mean of its row by so many deviations of a sample, else 0; float32, contiguous."""
    assert x.flags.c_contiguous
    launch(_kernel("thin_out"), int(x.shape[0]), 256, (x, int(x.shape[1]), float(deviations)))
