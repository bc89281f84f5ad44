"""Steps as numbers that a kernel reads: addresses, sizes, strides (kernels/stepping.py)."""

from __future__ import annotations

import struct
from typing import Any

import numpy.typing as npt

from engine.cpu.caches.rows import CacheRows
from engine.cpu.kernels.attention.attend import TYPES
from engine.cpu.kernels.build import kernel
from engine.cpu.kernels.integer.activations import Form
from engine.cpu.products.integer import Activations, IntegerWeights, dot_kind, n_items, quantize_operands
from engine.cpu.products.matmul import LANES, PreparedWeight, prepare
from engine.cpu.steps.protocol import Angles, Float32Array, Int32Array, Pages, Step
from engine.gguf.quants import dequantize
from engine.model.config import Activation, RopeStyle
from engine.model.weights import LayerWeights, Linear, Norm, Weight


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
    settings = (float_bits(norm.epsilon), 0, 0)
    return Step("normalize", norm.kind.name, (*operands, *settings), x.size // width, x.size, width)


def quantize_step(x: Float32Array, out: Activations, form: Form) -> Step:
    """Rows of x (T, K) in integers."""
    return Step("quantize", "F32", quantize_operands(x, out, form), out.shape[0] * out.shape[1], x.size)


def integer_step(
    weights: IntegerWeights,
    x: Activations,
    linear: Linear,
    weight: PreparedWeight,
    out: Float32Array,
    residual: Float32Array | None,
    per_float: int,
) -> Step:
    """out = a product in integers of quantized rows. per_float: such products in the time of one of floats."""
    operands = weights.operands(x, weight, out, scale=linear.scale, bias=linear.bias, residual=residual)
    kind, floats = dot_kind(len(x)), len(x) * weight.rows * weight.columns // per_float
    return Step(kind, weights.kernel_type(weight), operands, n_items(kind, weight), floats)


def rotate_step(
    x: Float32Array,
    rows: CacheRows,
    angles: Angles | None,
    cache: Pages,
    factors: Float32Array | None,
    store: bool,
) -> Step:
    """Rotation and cache append of all rows of x; without `store` the cache gives only the kernel's type."""
    assert x.flags.c_contiguous
    n_rows, heads, width = x.shape
    rotation = (0, 0, 0, 0, 0)
    if angles is not None:
        n_pairs = angles.cos.shape[1]
        pairs = (2, 1) if angles.style is RopeStyle.NORM else (1, n_pairs)
        rotation = (address(angles.cos), address(angles.sin), n_pairs, *pairs)
    factor = 0 if factors is None else address(factors)
    turned = cache.strides[2] < cache.strides[3]  # as the cache keeps keys
    target = (address(cache) if store else 0, address(rows.array), int(turned))
    operands = (address(x), heads, width, *rotation, factor, *target)
    return Step("rotate_store", TYPES[cache.dtype], operands, n_rows, x.size)


def gate_step(x: Float32Array, y: Float32Array | None, activation: Activation | None) -> Step:
    """activation(x) · y, written over x; None is the sigmoid."""
    assert x.flags.c_contiguous
    assert y is None or y.flags.c_contiguous
    operands = (address(x), 0 if y is None else address(y), address(x), 0, 0)
    # The exponential costs as much as some ten plain steps.
    name = "SIGMOID" if activation is None else activation.name
    return Step("gate", name, operands, x.size // LANES, 8 * x.size, x.shape[-1])


def columns_step(x: Float32Array, first: int, width: int, out: Float32Array) -> Step:
    """out = columns first to first + width - 1 of the last axis of x, both without gaps."""
    assert x.flags.c_contiguous
    operands = address(x), x.shape[-1], first, width, address(out)
    return Step("take_columns", "F32", operands, out.size // width, out.size)


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
