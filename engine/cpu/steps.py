"""The compiled steps between products, as numbers a kernel reads, and the way to run them at once.

`FastOps` asks a `Steps` for each of them. `Immediate` computes when asked; the recorder in program.py writes the same
steps into a program that is run later. Both use the same kernels, so both give the same bits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.cpu import reference
from engine.cpu.integer import (
    Activations,
    IntegerWeights,
    dot_kind,
    empty_activations,
    n_items,
    quantize_operands,
)
from engine.cpu.kernels.attend import TYPES, attend
from engine.cpu.kernels.build import kernel
from engine.cpu.matmul import LANES, PreparedWeight, matmul, prepare
from engine.cpu.threads import ThreadPool
from engine.gguf.quants import dequantize
from engine.model.batch import Batch, Span
from engine.model.config import Activation, AttentionTemperature, RopeStyle
from engine.model.rope import RopeTable
from engine.model.weights import LayerWeights, Linear, Norm, Weight

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

Finish = Callable[[Float32Array, Batch], None]
"""Changes rows of token_embd into the residual stream, in place."""

TASK_FLOATS = 1 << 15
"""Least floats per task of a small step: about 10 us."""


@dataclass(frozen=True)
class Angles:
    """How the tokens of a batch are rotated: cos and sin (T, n_pairs), and which elements form a pair."""

    cos: Float32Array
    sin: Float32Array
    style: RopeStyle


@dataclass(frozen=True)
class Pages:
    """Keys or values of a layer as one sequence sees them: all pages (N, K, PAGE, width), and which are its own.

    `table` is a row of the cache's table, whose address is always the same.
    """

    array: npt.NDArray[Any]
    table: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One call of a step kernel (kernels/stepping.py).

    Attributes:
        kind: name of the kernel.
        type_name: its type.
        operands: what it reads.
        items: how many items there are to share among threads.
        floats: how many floats all items together touch: a measure of the work.
        unit: floats of the result that are written together; where these are whole blocks of activations, the kernel
            can write activations as well, at the address that is its last operand. 0 where it cannot.
    """

    kind: str
    type_name: str
    operands: tuple[int, ...]
    items: int
    floats: int
    unit: int = 0


class Steps(Protocol):
    """What FastOps is made of. Names say which buffer a result may live in; results last until the name is used again.

    Steps called one after another run in no order until join(): it separates writing from reading.
    """

    def join(self) -> None:
        """What follows may read what was written before."""

    def embed(self, name: str, table: Weight, batch: Batch, finish: Finish) -> Float32Array:
        """Rows of the table, (T, D), as `finish` changes them in place."""

    def angles(self, rope: RopeTable, positions: Int32Array) -> Angles:
        """Angles of a step's tokens."""

    def factors(self, temperature: AttentionTemperature, positions: Int32Array) -> Float32Array:
        """(T,) factors on the queries."""

    def normalize(
        self, name: str, x: Float32Array, norm: Norm, residual: Float32Array | None = None, factor: float = 1.0
    ) -> Float32Array:
        """See reference.normalize; with a residual the result is residual + factor · norm(x)."""

    def linear(self, name: str, x: Float32Array, linear: Linear, residual: Float32Array | None = None) -> Float32Array:
        """scale · (x W') + bias + residual."""

    def rotate_store(
        self,
        x: Float32Array,
        span: Span,
        angles: Angles | None,
        cache: Pages,
        *,
        factors: Float32Array | None = None,
        store: bool = True,
    ) -> None:
        """Rotate the span's rows of x (T, heads, width) in place, scale them, and `store` them in the cache."""

    def attend(
        self,
        out: Float32Array,
        q: Float32Array,
        span: Span,
        cache: tuple[Pages, Pages],
        layer: LayerWeights,
    ) -> None:
        """Attention of the span's queries (T, H, Hd) over its cache into its rows of out (T, H · Hv)."""

    def gate(self, x: Float32Array, y: Float32Array | None, activation: Activation) -> Float32Array:
        """activation(x) · y, written over x."""

    def empty(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """A buffer for the caller to fill through steps."""


class Immediate:
    """Steps that compute when they are asked for, into new arrays.

    Args:
        pool: threads to use.
        integer: the weights that are multiplied in integers; None keeps everything in float32.
    """

    def __init__(self, pool: ThreadPool, integer: IntegerWeights | None = None) -> None:
        self._pool = pool
        self._integer = integer
        self._quantized: tuple[Float32Array, Activations] | None = None

    def join(self) -> None:
        """See Steps.join."""
        self._quantized = None  # what was read until now may be overwritten

    def empty(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """See Steps.empty."""
        return np.empty(shape, dtype=np.float32)

    def embed(self, name: str, table: Weight, batch: Batch, finish: Finish) -> Float32Array:
        """See Steps.embed."""
        out = np.empty((batch.n_tokens, table.columns), dtype=np.float32)
        embed_rows(table, batch.token_ids, out)
        finish(out, batch)
        return out

    def angles(self, rope: RopeTable, positions: Int32Array) -> Angles:
        """See Steps.angles."""
        return Angles(*rope.cos_sin(positions), rope.style)

    def factors(self, temperature: AttentionTemperature, positions: Int32Array) -> Float32Array:
        """See Steps.factors."""
        return reference.temperature_factors(positions, temperature)

    def normalize(
        self, name: str, x: Float32Array, norm: Norm, residual: Float32Array | None = None, factor: float = 1.0
    ) -> Float32Array:
        """See Steps.normalize."""
        out = np.empty(x.shape, dtype=np.float32)
        self._do(normalize_step(x, norm, out, residual, factor), x, out, residual)
        return out

    def linear(self, name: str, x: Float32Array, linear: Linear, residual: Float32Array | None = None) -> Float32Array:
        """See Steps.linear."""
        weight = prepare(linear.weight)
        if self._integer is not None and self._integer.takes(weight):
            return self._multiply(self._integer, self._activations(x), linear, weight, residual)
        y = matmul(x, linear.weight, pool=self._pool)
        if linear.scale != 1.0:
            y *= np.float32(linear.scale)
        if linear.bias is not None:
            y += linear.bias
        if residual is not None:
            y += residual
        return y

    def rotate_store(
        self,
        x: Float32Array,
        span: Span,
        angles: Angles | None,
        cache: Pages,
        *,
        factors: Float32Array | None = None,
        store: bool = True,
    ) -> None:
        """See Steps.rotate_store."""
        self._do(rotate_step(x, span, angles, cache, factors, store), x, angles, factors)

    def attend(
        self,
        out: Float32Array,
        q: Float32Array,
        span: Span,
        cache: tuple[Pages, Pages],
        layer: LayerWeights,
    ) -> None:
        """See Steps.attend."""
        keys, values = cache
        rows = slice(span.row, span.row + span.n_rows)
        settings = score_settings(layer) | {"n_past": span.n_past}
        out[rows] = attend(q[rows], keys.array, values.array, keys.table, pool=self._pool, **settings)

    def gate(self, x: Float32Array, y: Float32Array | None, activation: Activation) -> Float32Array:
        """See Steps.gate."""
        self._do(gate_step(x, y, activation), x, y)
        return x

    def _activations(self, x: Float32Array) -> Activations:
        """The rows of x in 8 bits; several products of the same rows share them."""
        if self._quantized is None or self._quantized[0] is not x:
            rows = x if x.strides[1] == x.itemsize else np.ascontiguousarray(x)
            out = empty_activations(*x.shape)
            self._do(quantize_step(rows, out), rows, out)
            self._quantized = x, out
        return self._quantized[1]

    def _multiply(
        self,
        integer: IntegerWeights,
        x: Activations,
        linear: Linear,
        weight: PreparedWeight,
        residual: Float32Array | None,
    ) -> Float32Array:
        out = np.empty((len(x), weight.rows), dtype=np.float32)
        if not len(x):
            return out
        kind = dot_kind(len(x))
        settings: dict[str, Any] = {"scale": linear.scale, "bias": linear.bias, "residual": residual}
        operands = integer.operands(x, weight, out, **settings)
        # Integer products take about a quarter of the time of others.
        floats = len(x) * weight.rows * weight.columns // 16
        step = Step(kind, integer.kernel_type(weight), operands, n_items(kind, weight), floats)
        self._do(step, x, out, linear, residual)
        return out

    def _do(self, step: Step, *alive: object) -> None:
        """Run a step; `alive` is what its addresses point into."""
        compute = kernel(step.kind, step.type_name)
        operands = np.array(step.operands, dtype=np.int64)
        start = address(operands)
        n_tasks = min(4 * self._pool.threads, step.items, step.floats // TASK_FLOATS)
        if n_tasks < 2 or self._pool.threads == 1:
            compute(start, 0, step.items, 0)
            return

        def task(index: int, held: object = (operands, alive)) -> None:
            compute(start, step.items * index // n_tasks, step.items * (index + 1) // n_tasks, 0)

        self._pool.run(task, n_tasks)


def score_settings(layer: LayerWeights) -> dict[str, Any]:
    """What the attention kernel needs to know of a layer."""
    config, weights = layer.config.attention, layer.attention
    return {
        "scale": config.scale,
        "window": config.window,
        "softcap": config.softcap,
        "sinks": weights.sinks,
        "slopes": weights.alibi_slopes,
    }


def normalize_step(
    x: Float32Array, norm: Norm, out: Float32Array, residual: Float32Array | None = None, factor: float = 1.0
) -> Step:
    """out = residual + factor · normalize(x) along the last axis, all without gaps."""
    width = x.shape[-1]
    arrays = [array for array in (x, norm.weight, norm.bias, residual) if array is not None]
    assert all(array.flags.c_contiguous for array in arrays)
    period = 1 if norm.weight is None else norm.weight.size // width
    weight, bias, added = (0 if array is None else address(array) for array in (norm.weight, norm.bias, residual))
    operands = (address(x), weight, bias, period, added, float_bits(factor), address(out), width)
    settings = (float_bits(norm.epsilon), 0)
    return Step("normalize", norm.kind.name, (*operands, *settings), x.size // width, x.size, width)


def quantize_step(x: Float32Array, out: Activations) -> Step:
    """Rows of x (T, K) in 8 bits."""
    return Step("quantize", "F32", quantize_operands(x, out), out.shape[0] * out.shape[1], x.size)


N_PAST = 11
"""Place of n_past among the operands of rotate_store."""


def rotate_step(
    x: Float32Array,
    span: Span,
    angles: Angles | None,
    cache: Pages,
    factors: Float32Array | None,
    store: bool,
) -> Step:
    """Rotation and cache append of one span's rows of x; without `store` the cache gives only the kernel's type."""
    assert x.flags.c_contiguous
    _, heads, width = x.shape
    rotation = (0, 0, 0, 0, 0)
    if angles is not None:
        n_pairs = angles.cos.shape[1]
        pairs = (2, 1) if angles.style is RopeStyle.NORM else (1, n_pairs)
        rotation = (address(angles.cos[span.row :]), address(angles.sin[span.row :]), n_pairs, *pairs)
    factor = 0 if factors is None else address(factors[span.row :])
    target = (address(cache.array), address(cache.table)) if store else (0, 0)
    turned = cache.array.strides[2] < cache.array.strides[3]  # as the cache keeps keys
    operands = (address(x[span.row :]), heads, width, *rotation, factor, *target, span.n_past, int(turned))
    return Step("rotate_store", TYPES[cache.array.dtype], operands, span.n_rows, span.n_rows * heads * width)


def gate_step(x: Float32Array, y: Float32Array | None, activation: Activation) -> Step:
    """activation(x) · y, written over x."""
    assert x.flags.c_contiguous
    assert y is None or y.flags.c_contiguous
    operands = (address(x), 0 if y is None else address(y), address(x), 0)
    # The exponential costs as much as some ten plain steps.
    return Step("gate", activation.name, operands, x.size // LANES, 8 * x.size, x.shape[-1])


def embed_rows(table: Weight, token_ids: Int32Array, out: Float32Array) -> None:
    """Write the rows of a packed table that the ids name into out (T, D)."""
    packed = prepare(table)
    if not packed.kernels:
        out[...] = dequantize(table.raw[token_ids], table.type)
        return
    unpack = kernel("dequantize_rows", packed.type.name)
    start, row_bytes = address(out), out.strides[0]
    for row, token_id in enumerate(token_ids.tolist()):
        source = packed.address + token_id * packed.stride
        unpack(source, packed.stride, packed.n_blocks, start + row * row_bytes, row_bytes, 1)


def float_bits(value: float) -> int:
    """A float64 as the integer of the same bits, as operands carry it."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def address(array: npt.NDArray[Any]) -> int:
    """Where an array begins in memory."""
    start: int = array.__array_interface__["data"][0]
    return start
