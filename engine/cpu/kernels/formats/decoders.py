"""One decoder per block format: emits code that turns a packed block into vectors of 16 float32 weights.

A decoder yields the block's weights in increasing column order, so that every loop built on it sums in the same order.
The byte layouts are drawn in engine/gguf/formats/, beside the class of each format; a test holds the sizes equal.
Independent of loops, rows and activations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from engine.cpu.kernels.emit import F32, I8, I16, I32, I64, LANES, Emitter, Value, vector

Decode = Callable[[Emitter, Value], Iterator[Value]]


@dataclass(frozen=True)
class Decoder:
    """How one format is read.

    Attributes:
        block_size: weights per block as the kernels step through a row (plain types are read 16 at a time).
        type_size: bytes per such block.
        decode: emits the vectors of the block at an address.
    """

    block_size: int
    type_size: int
    decode: Decode


DECODERS: dict[str, Decoder] = {}
"""GGML type name -> decoder."""


def _decoder(name: str, block_size: int, type_size: int) -> Callable[[Decode], Decode]:
    def add(decode: Decode) -> Decode:
        DECODERS[name] = Decoder(block_size, type_size, decode)
        return decode

    return add


@_decoder("F32", LANES, 4 * LANES)
def _f32(e: Emitter, block: Value) -> Iterator[Value]:
    yield e.load(block, vector(F32), align=4)


@_decoder("F16", LANES, 2 * LANES)
def _f16(e: Emitter, block: Value) -> Iterator[Value]:
    yield e.half_to_float(e.load(block, vector(I16)))


@_decoder("BF16", LANES, 2 * LANES)
def _bf16(e: Emitter, block: Value) -> Iterator[Value]:
    yield e.brain_to_float(e.load(block, vector(I16)))


@_decoder("Q8_0", 32, 34)
def _q8_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 0))
    for offset in (2, 18):
        yield e.multiply(e.signed_to_float(e.bytes(block, offset)), d)


@_decoder("Q4_0", 32, 18)
def _q4_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 0))
    q = e.bytes(block, 2)
    for nibbles in (e.mask(q, 15), e.shift_right(q, 4)):
        yield e.multiply(e.signed_to_float(e.minus(nibbles, 8)), d)


@_decoder("Q4_1", 32, 20)
def _q4_1(e: Emitter, block: Value) -> Iterator[Value]:
    d, m = e.splat(e.half(block, 0)), e.splat(e.half(block, 2))
    q = e.bytes(block, 4)
    for nibbles in (e.mask(q, 15), e.shift_right(q, 4)):
        yield e.multiply_add(e.unsigned_to_float(nibbles), d, m)


@_decoder("Q5_0", 32, 22)
def _q5_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 0))
    q = e.bytes(block, 6)
    for offset, nibbles in ((2, e.mask(q, 15)), (4, e.shift_right(q, 4))):
        fifth = e.spread_bits(e.load(block, I16, offset), 16)
        yield e.multiply(e.signed_to_float(e.minus(e.either(nibbles, fifth), 16)), d)


@_decoder("Q5_1", 32, 24)
def _q5_1(e: Emitter, block: Value) -> Iterator[Value]:
    d, m = e.splat(e.half(block, 0)), e.splat(e.half(block, 2))
    q = e.bytes(block, 8)
    for offset, nibbles in ((4, e.mask(q, 15)), (6, e.shift_right(q, 4))):
        fifth = e.spread_bits(e.load(block, I16, offset), 16)
        yield e.multiply_add(e.unsigned_to_float(e.either(nibbles, fifth)), d, m)


@_decoder("Q2_K", 256, 84)
def _q2_k(e: Emitter, block: Value) -> Iterator[Value]:
    packed = e.bytes(block, 0)
    d, dmin = e.splat(e.half(block, 80)), e.splat(e.half(block, 82))
    scales = e.multiply(e.unsigned_to_float(e.mask(packed, 15)), d)
    mins = e.negate(e.multiply(e.unsigned_to_float(e.shift_right(packed, 4)), dmin))
    for half in range(2):
        quants = [e.bytes(block, 16 + 32 * half + 16 * part) for part in range(2)]
        for shift in range(4):
            for part in range(2):
                group = 8 * half + 2 * shift + part
                q = e.unsigned_to_float(e.move_bits(quants[part], 3, 2 * shift, 0))
                yield e.multiply_add(q, e.splat_lane(scales, group), e.splat_lane(mins, group))


@_decoder("Q3_K", 256, 110)
def _q3_k(e: Emitter, block: Value) -> Iterator[Value]:
    low = e.load(block, I64, 96)
    low_nibbles = e.join([e.mask(low, 0x0F0F0F0F0F0F0F0F), e.move_bits(low, 0x0F0F0F0F0F0F0F0F, 4, 0)], vector(I8))
    high = e.load(block, I32, 104)
    high_pairs = e.join([e.move_bits(high, 0x03030303, 2 * pair, 4) for pair in range(4)], vector(I8))
    d = e.splat(e.half(block, 108))
    scales = e.multiply(e.signed_to_float(e.minus(e.either(low_nibbles, high_pairs), 32)), d)
    high_bits = [e.bytes(block, 16 * part) for part in range(2)]
    for half in range(2):
        quants = [e.bytes(block, 32 + 32 * half + 16 * part) for part in range(2)]
        for shift in range(4):
            for part in range(2):
                third = e.move_bits(high_bits[part], 1, 4 * half + shift, 2)
                q = e.minus(e.either(e.move_bits(quants[part], 3, 2 * shift, 0), third), 4)
                yield e.multiply(e.signed_to_float(q), e.splat_lane(scales, 8 * half + 2 * shift + part))


def _six_bit_scales(e: Emitter, block: Value) -> tuple[Value, Value]:
    """The eight scales and (negated) minimums that Q4_K and Q5_K pack into bytes 4..15, times d and dmin."""
    first, second, third = (e.load(block, I32, 4 + 4 * word) for word in range(3))
    scales = (
        e.mask(first, 0x3F3F3F3F),
        e.either(e.mask(third, 0x0F0F0F0F), e.move_bits(first, 0x03030303, 6, 4)),
    )
    mins = (
        e.mask(second, 0x3F3F3F3F),
        e.either(e.move_bits(third, 0x0F0F0F0F, 4, 0), e.move_bits(second, 0x03030303, 6, 4)),
    )
    d, dmin = e.splat(e.half(block, 0), 8), e.splat(e.half(block, 2), 8)
    return (
        e.multiply(e.unsigned_to_float(e.join(scales, vector(I8, 8))), d),
        e.negate(e.multiply(e.unsigned_to_float(e.join(mins, vector(I8, 8))), dmin)),
    )


@_decoder("Q4_K", 256, 144)
def _q4_k(e: Emitter, block: Value) -> Iterator[Value]:
    scales, mins = _six_bit_scales(e, block)
    for pair in range(4):
        quants = [e.bytes(block, 16 + 32 * pair + 16 * part) for part in range(2)]
        for nibble in range(2):
            scale, minimum = (e.splat_lane(values, 2 * pair + nibble) for values in (scales, mins))
            for q in quants:
                yield e.multiply_add(e.unsigned_to_float(e.move_bits(q, 15, 4 * nibble, 0)), scale, minimum)


@_decoder("Q5_K", 256, 176)
def _q5_k(e: Emitter, block: Value) -> Iterator[Value]:
    scales, mins = _six_bit_scales(e, block)
    fifths = [e.bytes(block, 16 + 16 * part) for part in range(2)]
    for pair in range(4):
        quants = [e.bytes(block, 48 + 32 * pair + 16 * part) for part in range(2)]
        for nibble in range(2):
            scale, minimum = (e.splat_lane(values, 2 * pair + nibble) for values in (scales, mins))
            for q, fifth in zip(quants, fifths, strict=True):
                high = e.move_bits(fifth, 1, 2 * pair + nibble, 4)
                value = e.unsigned_to_float(e.either(e.move_bits(q, 15, 4 * nibble, 0), high))
                yield e.multiply_add(value, scale, minimum)


@_decoder("Q6_K", 256, 210)
def _q6_k(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 208))
    scales = e.multiply(e.signed_to_float(e.bytes(block, 192)), d)
    for half in range(2):
        low = [e.bytes(block, 64 * half + 16 * part) for part in range(4)]
        high = [e.bytes(block, 128 + 32 * half + 16 * part) for part in range(2)]
        for group in range(4):
            for part in range(2):
                nibble = e.move_bits(low[2 * (group % 2) + part], 15, 4 * (group // 2), 0)
                q = e.minus(e.either(nibble, e.move_bits(high[part], 3, 2 * group, 4)), 32)
                yield e.multiply(e.signed_to_float(q), e.splat_lane(scales, 8 * half + 2 * group + part))


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the 4-bit numbers of IQ4_NL and IQ4_XS."""

MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The values of those of MXFP4, doubled."""


def power_of_two(e: Emitter, exponent: Value) -> Value:
    """2 ** (exponent - 128) as float32, for exponents 0..255 given as i32 (scalar or vector)."""
    b = e.builder
    # Written as the exponent of a float; the two smallest powers are subnormal numbers.
    tiny = b.shl(e.const(exponent, 0x00200000), e.mask(exponent, 1))
    bits = b.select(b.icmp_signed("<", exponent, e.const(exponent, 2)), tiny, e.shift_left(e.minus(exponent, 1), 23))
    return b.bitcast(bits, vector(F32, exponent.type.count) if isinstance(exponent.type, ir.VectorType) else F32)


def _looked_up(e: Emitter, block: Value, offset: int, table: tuple[int, ...], d: Value) -> Iterator[Value]:
    q = e.bytes(block, offset)
    for nibbles in (e.mask(q, 15), e.shift_right(q, 4)):
        yield e.multiply(e.signed_to_float(e.look_up(table, nibbles)), d)


@_decoder("IQ4_NL", 32, 18)
def _iq4_nl(e: Emitter, block: Value) -> Iterator[Value]:
    yield from _looked_up(e, block, 2, IQ4_VALUES, e.splat(e.half(block, 0)))


@_decoder("IQ4_XS", 256, 136)
def _iq4_xs(e: Emitter, block: Value) -> Iterator[Value]:
    d, high, low = e.half(block, 0), e.builder.zext(e.load(block, I16, 2), I32), e.load(block, I32, 4)
    for group in range(8):
        four = e.mask(e.shift_right(low, 4 * group), 15)
        number = e.minus(e.either(four, e.move_bits(high, 3, 2 * group, 4)), 32)
        scale = e.multiply(e.builder.sitofp(number, F32), d)
        yield from _looked_up(e, block, 8 + 16 * group, IQ4_VALUES, e.splat(scale))


@_decoder("MXFP4", 32, 17)
def _mxfp4(e: Emitter, block: Value) -> Iterator[Value]:
    scale = power_of_two(e, e.builder.zext(e.load(block, I8), I32))
    yield from _looked_up(e, block, 1, MXFP4_VALUES, e.splat(scale))
