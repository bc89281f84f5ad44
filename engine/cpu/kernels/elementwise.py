"""The small steps between products: normalization, rotation with the write into the cache, gated activation.

Each emits one step kernel (stepping.py). A row's result has the same bits for any rows computed with it.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.config import KV_BLOCK, PAGE
from engine.cpu.kernels.emit import F32, F64, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.integer.activations import quantize_blocks
from engine.cpu.kernels.integer.panels import GROUP
from engine.cpu.kernels.kv_blocks import quantize_row
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

GELU_LIMIT, SWIGLU_LIMIT, SWIGLU_SLOPE = 10.0, 7.0, 1.702
"""See ../reference.py, whose numbers these are."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {
    "normalize": STEP, "rotate_store": STEP, "gate": STEP, "take_columns": STEP,
}  # fmt: skip
"""Argument types of each kernel."""


def _offset(builder: Any, base: Value, index: Value, size: Value | int) -> Value:
    return builder.add(base, builder.mul(index, I64(size) if isinstance(size, int) else size))


@intrinsic(prefer_literal=True)
def normalize(typing_context, name, operands, low, high, scratch):
    """out[r] = residual[r] + factor * (x[r] / deviation * weight + bias) for rows low..high-1 of `width` floats.

    The kernel's type is RMS, deviation = sqrt(mean(x[r] ** 2) + epsilon), or LAYER, the same after mean(x[r]) was
    taken from x[r]. All arrays are without gaps. weight and bias have `period` rows, and row r takes row r % period of
    them; 0 = none. residual 0 = none. out may be x or residual.

    Operands: x, weight, bias, period, residual, factor, out, width (a multiple of 16), epsilon, activations, form.
    Where activations are wanted (else 0), out is written there as well, quantized (integer/activations.py, which says
    what form is); width is then a multiple of 32.
    """
    centered = format_name(name) == "LAYER"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, weight, bias, period, residual, factor, out, width, epsilon, activations, form = integers(e, operands, 11)
        epsilon, factor = (builder.fptrunc(builder.bitcast(bits, F64), F32) for bits in (epsilon, factor))
        total = cgutils.alloca_once(builder, vector(F32))
        center = cgutils.alloca_once_value(builder, vector(F32)([0.0] * LANES))
        value = cgutils.alloca_once(builder, vector(F32))
        root = builder.module.declare_intrinsic("llvm.sqrt", (F32,))
        parts, count = builder.sdiv(width, I64(LANES)), builder.sitofp(width, F32)

        def at(base: Value, offset: Value) -> Value:
            return e.load(builder.add(base, offset), vector(F32), align=4)

        with cgutils.for_range(builder, builder.sub(high, low)) as rows:
            row = builder.add(low, rows.index)
            start = builder.mul(builder.mul(row, width), I64(4))
            source, target = builder.add(x, start), builder.add(out, start)
            own = builder.mul(builder.mul(builder.srem(row, period), width), I64(4))
            if centered:
                builder.store(vector(F32)([0.0] * LANES), total)
                with cgutils.for_range(builder, parts) as part:
                    xs = at(source, builder.mul(part.index, I64(4 * LANES)))
                    builder.store(builder.fadd(xs, builder.load(total)), total)
                builder.store(e.splat(builder.fdiv(e.sum_lanes(builder.load(total)), count)), center)
            builder.store(vector(F32)([0.0] * LANES), total)
            with cgutils.for_range(builder, parts) as part:
                xs = builder.fsub(at(source, builder.mul(part.index, I64(4 * LANES))), builder.load(center))
                builder.store(e.multiply_add(xs, xs, builder.load(total)), total)
            mean = builder.fdiv(e.sum_lanes(builder.load(total)), count)
            divisor = e.splat(builder.call(root, (builder.fadd(mean, epsilon),)))
            with cgutils.for_range(builder, parts) as part:
                place = builder.mul(part.index, I64(4 * LANES))
                shared = builder.add(own, place)
                xs = builder.fsub(at(source, place), builder.load(center))
                builder.store(builder.fdiv(xs, divisor), value)
                with builder.if_then(builder.icmp_signed("!=", weight, I64(0))):
                    builder.store(e.multiply(builder.load(value), at(weight, shared)), value)
                with builder.if_then(builder.icmp_signed("!=", bias, I64(0))):
                    builder.store(builder.fadd(builder.load(value), at(bias, shared)), value)
                with builder.if_then(builder.icmp_signed("!=", residual, I64(0))):
                    scaled = e.multiply(builder.load(value), e.splat(factor))
                    builder.store(builder.fadd(scaled, at(residual, builder.add(start, place))), value)
                e.store(builder.load(value), builder.add(target, place))
            with builder.if_then(builder.icmp_signed("!=", activations, I64(0))):
                n_blocks = builder.sdiv(width, I64(GROUP))
                quantize_blocks(e, out, activations, form, builder.mul(row, n_blocks), n_blocks)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def rotate_store(typing_context, name, operands, low, high, scratch):
    """Rotates pairs of every head of tokens low..high-1 in place, scales them, and writes them into the cache.

    x is float32 (T, heads, width) without gaps; cos and sin (T, n_pairs); pair i of a head is its elements i * step and
    i * step + gap. `factors` (T,) multiplies whole heads, or is 0. `target` is a cache of the kernel's type, pages
    (N, heads, PAGE, width) without gaps, if turned (N, heads, width, PAGE), or 0 for none; of 8 bits the page of each
    head is followed by its scales, float16 (width / KV_BLOCK, PAGE). `rows` is int64 (T, 2), for
    each token the address of its sequence's table of pages, whose entry i has the positions from i * PAGE on, and its
    position.

    Operands: x, heads, width (a multiple of 16), cos, sin, n_pairs, step, gap, factors, target, rows, turned.
    """
    kv_type = format_name(name)
    size = {"F32": 4, "F16": 2, "Q8_0": 1}[kv_type]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, heads, width, cos, sin, n_pairs, step, gap, factors, target, places, turned = integers(e, operands, 12)
        row_bytes = builder.mul(width, I64(size))
        head_bytes = builder.mul(row_bytes, I64(PAGE))
        if kv_type == "Q8_0":
            head_bytes = builder.add(head_bytes, builder.mul(builder.sdiv(width, I64(KV_BLOCK)), I64(2 * PAGE)))
        with cgutils.for_range(builder, builder.sub(high, low)) as tokens:
            token = builder.add(low, tokens.index)
            angles = builder.mul(builder.mul(token, n_pairs), I64(4))
            row = _offset(builder, x, builder.mul(token, builder.mul(heads, width)), 4)
            with cgutils.for_range(builder, heads) as each:
                head = _offset(builder, row, builder.mul(each.index, width), 4)
                with cgutils.for_range(builder, n_pairs) as pairs:
                    c, s = (
                        e.load(_offset(builder, builder.add(table, angles), pairs.index, 4), F32, align=4)
                        for table in (cos, sin)
                    )
                    at_first = _offset(builder, head, builder.mul(pairs.index, step), 4)
                    at_second = _offset(builder, at_first, gap, 4)
                    first, second = (e.load(place, F32, align=4) for place in (at_first, at_second))
                    e.store(builder.fsub(e.multiply(first, c), e.multiply(second, s)), at_first)
                    e.store(builder.fadd(e.multiply(second, c), e.multiply(first, s)), at_second)
                parts = builder.sdiv(width, I64(LANES))
                with (
                    builder.if_then(builder.icmp_signed("!=", factors, I64(0))),
                    cgutils.for_range(builder, parts) as part,
                ):
                    factor = e.splat(e.load(_offset(builder, factors, token, 4), F32, align=4))
                    place = _offset(builder, head, part.index, 4 * LANES)
                    e.store(e.multiply(e.load(place, vector(F32), align=4), factor), place)
                with builder.if_then(builder.icmp_signed("!=", target, I64(0))):
                    own = _offset(builder, places, token, 16)
                    pages, position = (e.load(own, I64, offset, align=8) for offset in (0, 8))
                    page = e.load(_offset(builder, pages, builder.sdiv(position, I64(PAGE)), 8), I64, align=8)
                    in_head = builder.add(builder.mul(page, heads), each.index)
                    start = _offset(builder, target, in_head, head_bytes)
                    place = builder.srem(position, I64(PAGE))
                    is_turned = builder.icmp_signed("!=", turned, I64(0))
                    at_row = builder.add(start, builder.mul(place, row_bytes))
                    at_column = _offset(builder, start, place, size)
                    together = KV_BLOCK if kv_type == "Q8_0" else LANES
                    with cgutils.for_range(builder, builder.sdiv(width, I64(together))) as part:
                        values = e.load(
                            _offset(builder, head, part.index, 4 * together), vector(F32, together), align=4
                        )
                        if kv_type == "Q8_0":
                            stored, scale = quantize_row(e, values)
                            scales = _offset(builder, builder.add(start, builder.mul(row_bytes, I64(PAGE))), place, 2)
                            e.store(scale, _offset(builder, scales, part.index, 2 * PAGE), align=2)
                        else:
                            stored = e.float_to_half(values) if kv_type == "F16" else values
                        with builder.if_else(is_turned) as (columns, row):
                            with columns:
                                first = _offset(builder, at_column, part.index, together * PAGE * size)
                                for lane in range(together):
                                    one = builder.extract_element(stored, I64(lane))
                                    e.store(one, first, lane * PAGE * size, align=size)
                            with row:
                                e.store(stored, _offset(builder, at_row, part.index, together * size), align=1)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def gate(typing_context, name, operands, low, high, scratch):
    """out = activation(x) * y over vectors low..high-1 of 16 floats; out may be x.

    The kernel's type is the name of an Activation, or SIGMOID. Operands: x, y (0 = none), out,
    activations, form. Where activations are wanted (else 0), items are of 32 floats, and out is written there as well,
    quantized (integer/activations.py, which says what form is).
    """
    activation = format_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, y, out, activations, form = integers(e, operands, 5)
        wanted = builder.icmp_signed("!=", activations, I64(0))
        per_item = builder.select(wanted, I64(GROUP // LANES), I64(1))
        first, n_items = builder.mul(low, per_item), builder.sub(high, low)
        with cgutils.for_range(builder, builder.mul(n_items, per_item)) as vectors:
            place = builder.mul(builder.add(first, vectors.index), I64(4 * LANES))
            xs = e.load(builder.add(x, place), vector(F32), align=4)
            value = cgutils.alloca_once_value(builder, activate(e, xs, activation))
            with builder.if_then(builder.icmp_signed("!=", y, I64(0))):
                ys = e.load(builder.add(y, place), vector(F32), align=4)
                if activation == "SWIGLU_CLAMPED":
                    ys = builder.fadd(_clamp(e, ys, -SWIGLU_LIMIT, SWIGLU_LIMIT), e.const(ys, 1.0))
                builder.store(e.multiply(builder.load(value), ys), value)
            e.store(builder.load(value), builder.add(out, place))
        with builder.if_then(wanted):
            quantize_blocks(e, out, activations, form, low, n_items)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def take_columns(typing_context, name, operands, low, high, scratch):
    """out[r] = x[r, first : first + width] for rows low..high-1 of x, (rows, columns) float32 without gaps, as out.

    Operands: x, columns, first, width (a multiple of 16), out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, columns, first, width, out = integers(e, operands, 5)
        start = _offset(builder, x, first, 4)
        with cgutils.for_range(builder, builder.sub(high, low)) as rows:
            row = builder.add(low, rows.index)
            source = _offset(builder, start, builder.mul(row, columns), 4)
            target = _offset(builder, out, builder.mul(row, width), 4)
            with cgutils.for_range(builder, builder.sdiv(width, I64(LANES))) as part:
                value = e.load(_offset(builder, source, part.index, 4 * LANES), vector(F32), align=4)
                e.store(value, _offset(builder, target, part.index, 4 * LANES))
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def activate(e: Emitter, x: Value, activation: str) -> Value:
    """See reference.activate."""
    builder, zero = e.builder, e.const(x, 0.0)
    # NaN fails every comparison and so stays what it is.
    positive = builder.select(builder.fcmp_ordered("<", x, zero), zero, x)
    if activation in ("RELU", "RELU_SQUARED"):
        return positive if activation == "RELU" else e.multiply(positive, positive)
    if activation in ("SILU", "SIGMOID"):
        return sigmoid(e, x) if activation == "SIGMOID" else e.multiply(x, sigmoid(e, x))
    if activation == "SWIGLU_CLAMPED":
        limit = e.const(x, SWIGLU_LIMIT)
        x = builder.select(builder.fcmp_ordered(">", x, limit), limit, x)
        return e.multiply(x, sigmoid(e, e.multiply(x, e.const(x, SWIGLU_SLOPE))))
    assert activation == "GELU"
    rounded = _through_half(e, x)
    # 1 + tanh(z) is 2 sigmoid(2z), so the tanh form of GELU is x sigmoid(2z).
    cubic = e.multiply_add(e.multiply(rounded, rounded), e.const(x, 0.044715), e.const(x, 1.0))
    twice = e.multiply(e.multiply(cubic, rounded), e.const(x, 2.0 * math.sqrt(2.0 / math.pi)))
    inside = _through_half(e, e.multiply(rounded, sigmoid(e, twice)))
    size = builder.select(builder.fcmp_ordered(">", x, zero), x, e.negate(x))
    return builder.select(builder.fcmp_ordered(">=", size, e.const(x, GELU_LIMIT)), positive, inside)


def _through_half(e: Emitter, x: Value) -> Value:
    """x rounded to float16."""
    return e.half_to_float(e.float_to_half(x))


def _clamp(e: Emitter, x: Value, low: float, high: float) -> Value:
    builder, least, most = e.builder, e.const(x, low), e.const(x, high)
    x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
    return builder.select(builder.fcmp_ordered("<", x, least), least, x)


def sigmoid(e: Emitter, x: Value) -> Value:
    """1 / (1 + exp(-x)), through exp(-|x|) so that nothing overflows."""
    builder = e.builder
    positive = builder.fcmp_ordered(">", x, e.const(x, 0.0))
    small = e.exp(builder.select(positive, e.negate(x), x))
    one = e.const(x, 1.0)
    return builder.fdiv(builder.select(positive, one, small), builder.fadd(one, small))
