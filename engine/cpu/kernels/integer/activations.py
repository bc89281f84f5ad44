"""Activations of 8 bits: how rows of float32 are quantized, and what a block of them looks like.

A block has 32 columns and takes a cache line: 32 signed bytes q, then as float32 their scale d, d · sum(q), and d · sum
of the first and of the last 16 q.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import F32, I8, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.integer.panels import FLOATS, GROUP
from engine.cpu.kernels.isa import ACTIVATION_MAX, ROWS, V32
from engine.cpu.kernels.stepping import STEP, emitter, integers

LINE = 64
"""Bytes of a block of activations."""

AT_SCALE, AT_SUM, AT_FIRST, AT_LAST = 32, 36, 40, 44
"""Places of the float32 numbers in it."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"quantize": STEP}
"""Argument types of the kernel."""


def scaled(builder: Any, a: Value, b: int) -> Value:
    """a * b."""
    return builder.mul(a, I64(b))


@intrinsic(prefer_literal=True)
def quantize(typing_context, name, operands, low, high, scratch):
    """Blocks low..high-1 of 32 columns of float32 rows become blocks of activations.

    Operands: x, x_bytes, blocks per row, out (rows of such blocks without gaps).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, x_bytes, per_row, out = integers(e, operands, 4)
        with cgutils.for_range(builder, builder.sub(high, low)) as blocks:
            index = builder.add(low, blocks.index)
            row, block = builder.sdiv(index, per_row), builder.srem(index, per_row)
            source = builder.add(builder.add(x, builder.mul(row, x_bytes)), scaled(builder, block, 4 * GROUP))
            quantize_block(e, source, builder.add(out, scaled(builder, index, LINE)))
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def quantize_block(e: Emitter, source: Value, target: Value) -> None:
    """32 float32 at `source` become a block of activations: q = round(x / d), d = largest magnitude / 127."""
    b = e.builder
    parts = [e.load(source, FLOATS, 4 * ROWS * i, align=4) for i in range(GROUP // ROWS)]
    magnitudes = [b.bitcast(e.mask(b.bitcast(part, V32), 0x7FFFFFFF), FLOATS) for part in parts]
    largest = e.greater(e.greater(magnitudes[0], magnitudes[1]), e.greater(magnitudes[2], magnitudes[3]))
    while largest.type.count > 1:
        half = largest.type.count // 2
        largest = e.greater(e.part(largest, 0, half), e.part(largest, half, half))
    top = b.extract_element(largest, I32(0))
    scale = b.fdiv(top, e.const(top, float(ACTIVATION_MAX)))
    some = b.fcmp_ordered(">", top, e.const(top, 1e-30))  # its inverse must be finite
    inverse = b.select(some, b.fdiv(e.const(top, float(ACTIVATION_MAX)), top), e.const(top, 0.0))
    factor = e.splat(inverse, ROWS)
    # Adding 1.5 * 2**23 rounds to the nearest integer and leaves it in the low bits, whatever x is.
    rounder = e.const(factor, 12582912.0)
    sums = []
    for i, part in enumerate(parts):
        bits = b.bitcast(b.fadd(e.multiply(part, factor), rounder), V32)
        numbers = b.trunc(bits, vector(I8, ROWS))
        e.store(numbers, target, ROWS * i, align=1)
        sums.append(b.sext(numbers, V32))
    totals = [_sum_lanes(e, b.add(sums[i], sums[i + 1])) for i in (0, 2)]
    e.store(scale, target, AT_SCALE)
    for total, place in ((b.add(*totals), AT_SUM), (totals[0], AT_FIRST), (totals[1], AT_LAST)):
        e.store(e.multiply(b.sitofp(total, F32), scale), target, place)


def quantize_blocks(e: Emitter, source: Value, target: Value, first: Value, count: Value) -> None:
    """Quantizes blocks first..first+count-1 of floats without gaps."""
    with cgutils.for_range(e.builder, count) as blocks:
        index = e.builder.add(first, blocks.index)
        floats = e.builder.add(source, scaled(e.builder, index, 4 * GROUP))
        quantize_block(e, floats, e.builder.add(target, scaled(e.builder, index, LINE)))


def _sum_lanes(e: Emitter, value: Value) -> Value:
    while value.type.count > 1:
        half = value.type.count // 2
        value = e.builder.add(e.part(value, 0, half), e.part(value, half, half))
    return e.builder.extract_element(value, I32(0))
