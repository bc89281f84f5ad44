"""Activations in integers: how rows of float32 are quantized, and what a block of 32 columns of them looks like.

First come the numbers q, then as float32 their scale d, d · sum(q), and d · sum of the first and of the last 16 q, then
as int32 these three sums. Of 8 bits, q are 32 signed bytes, or unsigned ones, q + 128; the last sums are in two halves
of 16 bits, the lower one for columns 0, 1, 4, 5, 8, ..., and behind them is -SHIFT · d as float32. Of 16 bits q are
split into 32 signed bytes h and 32 signed bytes l, q = 256 h + l, or they are pairs of neighbours in the order in which
even and odd bytes of a word of weights come: columns 0 and 2, 1 and 3, 4 and 6, and so on. Of 14 bits they are pairs in
the order of columns.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import F32, I8, I16, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.integer.panels import FLOATS, GROUP, HIGHEST_14, HIGHEST_16
from engine.cpu.kernels.isa import ACTIVATION_MAX, BIAS, ROWS, V32
from engine.cpu.kernels.stepping import STEP, emitter, integers


class Form(IntEnum):
    """What a kernel that quantizes writes."""

    BYTES = 0
    SPLIT = 1
    PAIRS = 2
    SHORT = 3
    BIASED = 4

    @property
    def bits(self) -> int:
        """Of an activation."""
        return (8, 16, 16, 14, 8)[self]


@dataclass(frozen=True)
class Line:
    """A block of activations of 8, 14 or 16 bits.

    Attributes:
        n_bytes: of the block.
        largest: largest magnitude of q.
        scale: where d is.
        sums: where d times the sums of all q, the first 16 and the last 16 are.
        counts: where these sums as integers are.
        halves: whether these are two numbers of 16 bits each.
        shifted: where -SHIFT times d is; d then has two bits less than a float32, so that this is exact.
    """

    n_bytes: int
    largest: int
    scale: int
    sums: tuple[int, int, int]
    counts: tuple[int, int, int]
    halves: bool = False
    shifted: int = 0

    def places(self, of: tuple[int, int, int], count: int) -> tuple[int, ...]:
        """Where the sums `of` all columns are (count 1) or those of the halves (2)."""
        return of[:1] if count == 1 else of[1:]


SHIFT = 12582912.0
"""1.5 * 2 ** 23: a float32 near it has the integer that it is more than this in its low bits."""

LINES = {
    8: Line(64, ACTIVATION_MAX, 32, (36, 40, 44), (48, 52, 56), halves=True, shifted=60),
    14: Line(96, HIGHEST_14, 64, (68, 72, 76), (80, 84, 88)),
    16: Line(96, HIGHEST_16, 64, (68, 72, 76), (80, 84, 88)),
}
"""By bits."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"quantize": STEP}
"""Argument types of the kernel."""


def scaled(builder: Any, a: Value, b: int) -> Value:
    """a * b."""
    return builder.mul(a, I64(b))


@intrinsic(prefer_literal=True)
def quantize(typing_context, name, operands, low, high, scratch):
    """Blocks low..high-1 of 32 columns of float32 rows become blocks of activations.

    Operands: x, x_bytes, blocks per row, out (rows of such blocks without gaps), form (a Form).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, x_bytes, per_row, out, form = integers(e, operands, 5)
        size = _line_bytes(builder, form)
        with cgutils.for_range(builder, builder.sub(high, low)) as blocks:
            index = builder.add(low, blocks.index)
            row, block = builder.sdiv(index, per_row), builder.srem(index, per_row)
            source = builder.add(builder.add(x, builder.mul(row, x_bytes)), scaled(builder, block, 4 * GROUP))
            quantize_block(e, source, builder.add(out, builder.mul(index, size)), form)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _line_bytes(builder: Any, form: Value) -> Value:
    return builder.select(_is_narrow(builder, form), I64(LINES[8].n_bytes), I64(LINES[16].n_bytes))


def _is_narrow(builder: Any, form: Value) -> Value:
    of_bytes = (builder.icmp_signed("==", form, I64(narrow)) for narrow in (Form.BYTES, Form.BIASED))
    return builder.or_(*of_bytes)


def quantize_block(e: Emitter, source: Value, target: Value, form: Value) -> None:
    """32 float32 at `source` become a block of activations: q = round(x / d), d = largest magnitude / largest q."""
    b = e.builder
    parts = [e.load(source, FLOATS, 4 * ROWS * i, align=4) for i in range(GROUP // ROWS)]
    magnitudes = [b.bitcast(e.mask(b.bitcast(part, V32), 0x7FFFFFFF), FLOATS) for part in parts]
    largest = e.greater(e.greater(magnitudes[0], magnitudes[1]), e.greater(magnitudes[2], magnitudes[3]))
    while largest.type.count > 1:
        half = largest.type.count // 2
        largest = e.greater(e.part(largest, 0, half), e.part(largest, half, half))
    top = b.extract_element(largest, I32(0))
    with b.if_else(_is_narrow(b, form)) as (narrow, wide):
        with narrow:
            bias = b.select(b.icmp_signed("==", form, I64(Form.BIASED)), I8(BIAS), I8(0))
            _write_line(e, parts, top, LINES[8], e.const(top, float(LINES[8].largest)), target, bias)
        with wide:
            short = b.icmp_signed("==", form, I64(Form.SHORT))
            most = b.select(short, *(e.const(top, float(LINES[bits].largest)) for bits in (14, 16)))
            integers = _write_line(e, parts, top, LINES[16], most, target)
            with b.if_else(b.icmp_signed("==", form, I64(Form.SPLIT))) as (split, pairs):
                with split:
                    for i, part in enumerate(integers):
                        high = b.ashr(b.add(part, e.const(part, 128)), e.const(part, 8))
                        e.store(b.trunc(high, vector(I8, ROWS)), target, ROWS * i, align=1)
                        e.store(b.trunc(part, vector(I8, ROWS)), target, GROUP + ROWS * i, align=1)
                with pairs:
                    for i, part in enumerate(integers):
                        numbers = b.trunc(part, vector(I16, ROWS))
                        mixed = b.shuffle_vector(numbers, numbers, ir.Constant(V32, [0, 2, 1, 3, 4, 6, 5, 7]))
                        numbers = b.select(short, numbers, mixed)
                        e.store(numbers, target, 2 * ROWS * i, align=1)


def _write_line(
    e: Emitter, parts: list[Value], top: Value, line: Line, most: Value, target: Value, bias: Value | None = None
) -> list[Value]:
    """Writes scale and sums, and bytes q; gives q (8 × i32 each) of the parts.

    top: their largest magnitude; most: that of q; bias: added to bytes.
    """
    b = e.builder
    scale = b.fdiv(top, most)
    if line.shifted:
        scale = b.bitcast(e.mask(b.bitcast(scale, I32), 0xFFFFFFFC), F32)
        e.store(e.multiply(scale, e.const(scale, -SHIFT)), target, line.shifted)
    some = b.fcmp_ordered(">", top, e.const(top, 1e-30))  # its inverse must be finite
    inverse = b.select(some, b.fdiv(most, top), e.const(top, 0.0))
    factor = e.splat(inverse, ROWS)
    # Adding SHIFT rounds to the nearest integer and leaves it in the low bits, whatever x is.
    rounder = e.const(factor, SHIFT)
    integers = []
    for i, part in enumerate(parts):
        bits = b.bitcast(b.fadd(e.multiply(part, factor), rounder), V32)
        short = b.trunc(bits, vector(I16 if bias is None else I8, ROWS))
        if bias is not None:
            e.store(b.add(short, e.splat(bias, ROWS)), target, ROWS * i, align=1)
        integers.append(b.sext(short, V32))
    first, last = (_sums_of_pairs(e, b.add(integers[i], integers[i + 1])) for i in (0, 2))
    e.store(scale, target, line.scale)
    whole = [b.add(*both) for both in zip(first, last, strict=True)]
    for number, (low, high) in enumerate((whole, first, last)):
        total = b.add(low, high)
        e.store(e.multiply(b.sitofp(total, F32), scale), target, line.sums[number])
        halves = e.either(e.mask(low, 0xFFFF), e.shift_left(high, 16))
        e.store(halves if line.halves else total, target, line.counts[number])
    return integers


def quantize_blocks(e: Emitter, source: Value, target: Value, form: Value, first: Value, count: Value) -> None:
    """Quantizes blocks first..first+count-1 of floats without gaps."""
    size = _line_bytes(e.builder, form)
    with cgutils.for_range(e.builder, count) as blocks:
        index = e.builder.add(first, blocks.index)
        floats = e.builder.add(source, scaled(e.builder, index, 4 * GROUP))
        quantize_block(e, floats, e.builder.add(target, e.builder.mul(index, size)), form)


def _sums_of_pairs(e: Emitter, value: Value) -> tuple[Value, Value]:
    """Sums of lanes 0, 1, 4, 5 and of lanes 2, 3, 6, 7."""
    b = e.builder
    four = b.add(e.part(value, 0, 4), e.part(value, 4, 4))
    lanes = [b.extract_element(four, I32(lane)) for lane in range(4)]
    return b.add(*lanes[:2]), b.add(*lanes[2:])
