"""The small steps between products: normalization, rotation with the write into the cache, gated activation.

Each emits one step kernel (stepping.py). A row's result has the same bits whatever rows are computed with it.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.config import PAGE
from engine.cpu.kernels.emit import F32, F64, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.integer import quantize_blocks
from engine.cpu.kernels.panels import GROUP
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"normalize": STEP, "rotate_store": STEP, "gate": STEP}
"""Argument types of each kernel."""


def _offset(builder: Any, base: Value, index: Value, size: Value | int) -> Value:
    return builder.add(base, builder.mul(index, I64(size) if isinstance(size, int) else size))


@intrinsic(prefer_literal=True)
def normalize(typing_context, name, operands, low, high, scratch):
    """out[r] = x[r] / sqrt(mean(x[r] ** 2) + epsilon) * weight for rows low..high-1 of `width` floats without gaps.

    Operands: x, weight, out, width (a multiple of 16), epsilon, activations. out may be x. Where activations are wanted
    (else 0), out is written there as well, quantized (integer.py); width is then a multiple of 32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, weight, out, width, epsilon, activations = integers(e, operands, 6)
        epsilon = builder.fptrunc(builder.bitcast(epsilon, F64), F32)
        total = cgutils.alloca_once(builder, vector(F32))
        root = builder.module.declare_intrinsic("llvm.sqrt", (F32,))
        parts = builder.sdiv(width, I64(LANES))
        with cgutils.for_range(builder, builder.sub(high, low)) as rows:
            start = builder.mul(builder.mul(builder.add(low, rows.index), width), I64(4))
            source, target = builder.add(x, start), builder.add(out, start)
            builder.store(vector(F32)([0.0] * LANES), total)
            with cgutils.for_range(builder, parts) as part:
                xs = e.load(_offset(builder, source, part.index, 4 * LANES), vector(F32), align=4)
                builder.store(e.multiply_add(xs, xs, builder.load(total)), total)
            mean = builder.fdiv(e.sum_lanes(builder.load(total)), builder.sitofp(width, F32))
            divisor = e.splat(builder.call(root, (builder.fadd(mean, epsilon),)))
            with cgutils.for_range(builder, parts) as part:
                place = builder.mul(part.index, I64(4 * LANES))
                xs = e.load(builder.add(source, place), vector(F32), align=4)
                ws = e.load(builder.add(weight, place), vector(F32), align=4)
                e.store(e.multiply(builder.fdiv(xs, divisor), ws), builder.add(target, place))
            with builder.if_then(builder.icmp_signed("!=", activations, I64(0))):
                n_blocks = builder.sdiv(width, I64(GROUP))
                first = builder.mul(builder.add(low, rows.index), n_blocks)
                quantize_blocks(e, out, activations, first, n_blocks)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def rotate_store(typing_context, name, operands, low, high, scratch):
    """Rotates pairs of every head of tokens low..high-1 in place, scales them, and writes them into the cache.

    x is float32 (T, heads, width) without gaps; cos and sin (T, n_pairs); pair i of a head is its elements i * step and
    i * step + gap. `factors` (T,) multiplies whole heads, or is 0. `target` is a cache of the kernel's type, pages
    (N, heads, PAGE, width) without gaps, or 0 for none; token 0 goes to position n_past, and pages[i] (int64) has the
    positions from i * PAGE on.

    Operands: x, heads, width (a multiple of 16), cos, sin, n_pairs, step, gap, factors, target, pages, n_past.
    """
    half = format_name(name) == "F16"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, heads, width, cos, sin, n_pairs, step, gap, factors, target, pages, n_past = integers(e, operands, 12)
        row_bytes = builder.mul(width, I64(2 if half else 4))
        with cgutils.for_range(builder, builder.sub(high, low)) as tokens:
            token = builder.add(low, tokens.index)
            angles = builder.mul(builder.mul(token, n_pairs), I64(4))
            row = _offset(builder, x, builder.mul(token, builder.mul(heads, width)), 4)
            position = builder.add(n_past, token)
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
                    page = e.load(_offset(builder, pages, builder.sdiv(position, I64(PAGE)), 8), I64, align=8)
                    in_page = builder.mul(builder.add(builder.mul(page, heads), each.index), I64(PAGE))
                    place = builder.add(in_page, builder.srem(position, I64(PAGE)))
                    place = _offset(builder, target, place, row_bytes)
                    with cgutils.for_range(builder, parts) as part:
                        values = e.load(_offset(builder, head, part.index, 4 * LANES), vector(F32), align=4)
                        stored = e.float_to_half(values) if half else values
                        e.store(stored, _offset(builder, place, part.index, (2 if half else 4) * LANES), align=2)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def gate(typing_context, name, operands, low, high, scratch):
    """out = activation(x) * y over vectors low..high-1 of 16 floats; out may be x. The kernel's type is SILU or GELU.

    Operands: x, y (0 = none), out, activations. Where activations are wanted (else 0), items are of 32 floats, and out
    is written there as well, quantized (integer.py).
    """
    activation = format_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, y, out, activations = integers(e, operands, 4)
        wanted = builder.icmp_signed("!=", activations, I64(0))
        per_item = builder.select(wanted, I64(GROUP // LANES), I64(1))
        first, n_items = builder.mul(low, per_item), builder.sub(high, low)
        with cgutils.for_range(builder, builder.mul(n_items, per_item)) as vectors:
            place = builder.mul(builder.add(first, vectors.index), I64(4 * LANES))
            xs = e.load(builder.add(x, place), vector(F32), align=4)
            value = cgutils.alloca_once_value(builder, e.multiply(xs, _sigmoid(e, _slope(e, xs, activation))))
            with builder.if_then(builder.icmp_signed("!=", y, I64(0))):
                ys = e.load(builder.add(y, place), vector(F32), align=4)
                builder.store(e.multiply(builder.load(value), ys), value)
            e.store(builder.load(value), builder.add(out, place))
        with builder.if_then(wanted):
            quantize_blocks(e, out, activations, low, n_items)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _slope(e: Emitter, x: Value, activation: str) -> Value:
    """What the sigmoid is taken of: 1 + tanh(z) is 2 sigmoid(2z), so the tanh form of GELU is x sigmoid(2z) too."""
    if activation == "SILU":
        return x
    assert activation == "GELU"
    cubic = e.multiply_add(e.multiply(x, x), e.const(x, 0.044715), e.const(x, 1.0))
    return e.multiply(e.multiply(cubic, x), e.const(x, 2.0 * math.sqrt(2.0 / math.pi)))


def _sigmoid(e: Emitter, x: Value) -> Value:
    """1 / (1 + exp(-x)), through exp(-|x|) so that nothing overflows."""
    builder = e.builder
    positive = builder.fcmp_ordered(">", x, e.const(x, 0.0))
    small = e.exp(builder.select(positive, e.negate(x), x))
    one = e.const(x, 1.0)
    return builder.fdiv(builder.select(positive, one, small), builder.fadd(one, small))
