"""Decoders of the formats of one or two bits, of NVFP4, of activations, and of plain numbers that few files hold.

See decoders.py for what a decoder is.
"""

from collections.abc import Iterator
from functools import partial

from llvmlite import ir

from engine.cpu.kernels.emit import F32, F64, I8, I16, I32, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.formats.decoders import DECODERS, MXFP4_VALUES, Decoder
from engine.cpu.kernels.formats.grids import constant, register
from engine.gguf.formats.fp4_quants import UE4M3_HALVED
from engine.gguf.types import GGMLType


def _lanes(values: list[int]) -> Value:
    return ir.Constant(vector(I8), [value & 0xFF for value in values])


def _digits(e: Emitter, packed: Value, powers: list[int]) -> Value:
    """The base-3 digit of each of 16 bytes that a multiplication by a power of three brings to the front."""
    left = e.builder.zext(e.builder.mul(packed, _lanes(powers)), vector(I16))
    tripled = e.builder.mul(left, e.const(left, 3))
    return e.builder.trunc(e.shift_right(tripled, 8), vector(I8))


def trits(e: Emitter, block: Value) -> Iterator[Value]:
    """The numbers 0, 1 or 2 of a block of TQ1_0, 16 bytes at a time."""
    for start, parts in ((0, 2), (32, 1)):
        packed = [e.bytes(block, start + 16 * part) for part in range(parts)]
        for digit in range(5):
            for sixteen in packed:
                yield _digits(e, sixteen, [3**digit] * LANES)
    # Four bytes of four digits: lane 4 k + j is digit k of byte j.
    four = e.load(block, I32, 48)
    yield _digits(e, e.join([four] * 4, vector(I8)), [3 ** (lane // 4) for lane in range(LANES)])


def _tq1_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 52))
    for numbers in trits(e, block):
        yield e.multiply(e.signed_to_float(e.minus(numbers, 1)), d)


def _tq2_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 64))
    for half in range(2):
        quants = [e.bytes(block, 32 * half + 16 * part) for part in range(2)]
        for shift in range(4):
            for q in quants:
                yield e.multiply(e.signed_to_float(e.minus(e.move_bits(q, 3, 2 * shift, 0), 1)), d)


def _q1_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 0))
    for offset in range(2, 18, 2):
        twos = e.spread_bits(e.load(block, I16, offset), 2)
        yield e.multiply(e.signed_to_float(e.minus(twos, 1)), d)


def _q2_0(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.half(block, 0))
    # Lane i takes bits 2 (i % 4) and up of byte i / 4.
    repeat = ir.Constant(vector(I32), [lane // 4 for lane in range(LANES)])
    shifts = _lanes([2 * (lane % 4) for lane in range(LANES)])
    for offset in range(2, 18, 4):
        four = e.bytes(block, offset, 4)
        spread = e.builder.shuffle_vector(four, ir.Constant(four.type, ir.Undefined), repeat)
        q = e.minus(e.mask(e.builder.lshr(spread, shifts), 3), 1)
        yield e.multiply(e.signed_to_float(q), d)


def _nvfp4(e: Emitter, block: Value) -> Iterator[Value]:
    scales = constant(e, "ue4m3_halved", UE4M3_HALVED)
    for part in range(4):
        code = e.builder.zext(e.load(block, I8, part), I64)
        d = e.load(e.builder.add(scales, e.shift_left(code, 2)), F32, align=4)
        packed = e.load(block, I64, 4 + 8 * part)
        mask = 0x0F0F0F0F0F0F0F0F
        q = e.join([e.mask(packed, mask), e.move_bits(packed, mask, 4, 0)], vector(I8))
        yield e.multiply(e.signed_to_float(e.look_up(MXFP4_VALUES, q)), e.splat(d))


def _bytes_times_d(offset: int, count: int, e: Emitter, block: Value) -> Iterator[Value]:
    d = e.splat(e.load(block, F32))
    for at in range(offset, offset + count, LANES):
        yield e.multiply(e.signed_to_float(e.bytes(block, at)), d)


def _whole_numbers(kind: ir.Type, e: Emitter, block: Value) -> Iterator[Value]:
    yield e.builder.sitofp(e.load(block, vector(kind)), vector(F32))


def _f64(e: Emitter, block: Value) -> Iterator[Value]:
    yield e.builder.fptrunc(e.load(block, vector(F64)), vector(F32))


register(GGMLType.TQ1_0, _tq1_0)
register(GGMLType.TQ2_0, _tq2_0)
register(GGMLType.Q1_0, _q1_0)
register(GGMLType.Q2_0, _q2_0)
register(GGMLType.NVFP4, _nvfp4)
register(GGMLType.Q8_1, partial(_bytes_times_d, 8, 32))
register(GGMLType.Q8_K, partial(_bytes_times_d, 4, 256))
# Plain numbers are read 16 at a time.
DECODERS["F64"] = Decoder(LANES, 8 * LANES, _f64)
for _name, _kind in (("I8", I8), ("I16", I16), ("I32", I32), ("I64", I64)):
    DECODERS[_name] = Decoder(LANES, _kind.width // 8 * LANES, partial(_whole_numbers, _kind))
