"""Decoders of the formats whose numbers are indices into a grid of points (see decoders.py for what a decoder is).

Grids and signs come from engine/gguf/formats/grids.py and are constants of the compiled code: 1 to 16 KB a format.
PIECES says where a block has the indices and signs; it is shared with grid_panels.py, which looks other things up
with them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from engine.cpu.kernels.emit import F32, I8, I16, I32, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.formats.decoders import DECODERS, Decode, Decoder
from engine.gguf.formats.grids import grid, signs_of_seven
from engine.gguf.formats.i_quants import IQ1_DELTA
from engine.gguf.types import GGMLType


@dataclass(frozen=True)
class Piece:
    """16 columns of a row: indices of their points (i64), and their signs as an i16, or None where there are none."""

    indices: list[Value]
    signs: Value | None = None


PIECES: dict[str, Callable[[Emitter, Value], Iterator[Piece]]] = {}
"""GGML type name -> emits the pieces of the block at an address."""


def register(type: GGMLType, decode: Decode) -> None:
    """Make a decoder that steps through rows by blocks of the format known."""
    DECODERS[type.name] = Decoder(type.block_size, type.type_size, decode)


def constant(e: Emitter, name: str, values: npt.NDArray[np.generic]) -> Value:
    """The address of a table that becomes part of the compiled code."""
    module, data = e.builder.module, bytearray(values.tobytes())
    table = module.globals.get(name)
    if table is None:
        table = ir.GlobalVariable(module, ir.ArrayType(I8, len(data)), name)
        table.initializer = ir.Constant(table.value_type, data)
        table.linkage, table.global_constant, table.align = "internal", True, 64
    return e.builder.ptrtoint(table, I64)


def wide(e: Emitter, block: Value, kind: ir.Type, offset: int, to: ir.Type = I64) -> Value:
    """An unsigned number of the block as one of 32 or 64 bits."""
    return e.builder.zext(e.load(block, kind, offset), to)


def look_up_points(e: Emitter, name: str, points: npt.NDArray[np.int8 | np.uint8], indices: list[Value]) -> Value:
    """Rows of a table of two points of 8 coordinates, or of four points of 4, as 16 bytes."""
    table, size = constant(e, name, points), LANES // len(indices)
    kind = I64 if size == 8 else I32
    places = (e.builder.add(table, e.shift_left(index, size.bit_length() - 1)) for index in indices)
    return e.join([e.load(place, kind, align=size) for place in places], vector(I8))


def negative_lanes(e: Emitter, signs: Value) -> Value:
    """An i16 becomes 16 bytes: lane j is -1 where bit j is set, else 0."""
    return e.builder.sext(e.builder.bitcast(signs, vector(ir.IntType(1))), vector(I8))


def _sixteen_signs(e: Emitter, packed: Value, shift: int) -> Value:
    """The signs of two points from 14 bits of an i32, 7 for each."""
    table = constant(e, "signs_of_seven", signs_of_seven())
    first, second = (
        e.load(e.builder.add(table, e.builder.zext(e.mask(e.shift_right(packed, at), 127), I64)), I8)
        for at in (shift, shift + 7)
    )
    return e.either(e.builder.zext(first, I16), e.shift_left(e.builder.zext(second, I16), 8))


# Where the indices and signs are.


def _pieces(type: GGMLType) -> Callable[[Callable[[Emitter, Value], Iterator[Piece]]], object]:
    def add(pieces: Callable[[Emitter, Value], Iterator[Piece]]) -> object:
        PIECES[type.name] = pieces
        return pieces

    return add


@_pieces(GGMLType.IQ2_XXS)
def _iq2_xxs_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for at in range(2, 66, 8):
        packed = e.load(block, I32, at + 4)
        for pair in (0, 2):
            indices = [wide(e, block, I8, at + pair + i) for i in range(2)]
            yield Piece(indices, _sixteen_signs(e, packed, 7 * pair))


@_pieces(GGMLType.IQ3_XXS)
def _iq3_xxs_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for group in range(8):
        packed = e.load(block, I32, 66 + 4 * group)
        for half in range(2):
            indices = [wide(e, block, I8, 2 + 8 * group + 4 * half + i) for i in range(4)]
            yield Piece(indices, _sixteen_signs(e, packed, 14 * half))


@_pieces(GGMLType.IQ2_XS)
def _iq2_xs_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for group in range(16):
        packed = [wide(e, block, I16, 2 + 4 * group + 2 * i) for i in range(2)]
        signs = e.either(e.shift_right(packed[0], 9), e.shift_left(e.shift_right(packed[1], 9), 7))
        yield Piece([e.mask(two, 511) for two in packed], _sixteen_signs(e, e.builder.trunc(signs, I32), 0))


@_pieces(GGMLType.IQ2_S)
def _iq2_s_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for group in range(16):
        high = wide(e, block, I8, 66 + group // 2)
        indices = [
            e.either(wide(e, block, I8, 2 + 2 * group + i), e.move_bits(high, 3, 4 * (group % 2) + 2 * i, 8))
            for i in range(2)
        ]
        yield Piece(indices, e.load(block, I16, 34 + 2 * group))


@_pieces(GGMLType.IQ3_S)
def _iq3_s_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for group in range(8):
        high = wide(e, block, I8, 66 + group)
        for half in range(2):
            indices = [
                e.either(wide(e, block, I8, 2 + 8 * group + i), e.move_bits(high, 1, i, 8))
                for i in range(4 * half, 4 * half + 4)
            ]
            yield Piece(indices, e.load(block, I16, 74 + 4 * group + 2 * half))


@_pieces(GGMLType.IQ1_S)
def _iq1_s_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for group in range(8):
        high = wide(e, block, I16, 34 + 2 * group)
        for half in range(2):
            yield Piece(
                [
                    e.either(wide(e, block, I8, 2 + 4 * group + i), e.move_bits(high, 7, 3 * i, 8))
                    for i in range(2 * half, 2 * half + 2)
                ]
            )


@_pieces(GGMLType.IQ1_M)
def _iq1_m_pieces(e: Emitter, block: Value) -> Iterator[Piece]:
    for group in range(16):
        high = wide(e, block, I8, 32 + group)
        yield Piece([e.either(wide(e, block, I8, 2 * group + i), e.move_bits(high, 7, 4 * i, 8)) for i in range(2)])


# Decoders.


def _points(e: Emitter, type: GGMLType, block: Value) -> Iterator[Value]:
    """The coordinates, with their signs, of all points of a block, 16 signed bytes at a time."""
    name = "IQ1_S" if type is GGMLType.IQ1_M else type.name
    for piece in PIECES[type.name](e, block):
        points = look_up_points(e, f"grid_{name}", grid(name), piece.indices)
        if piece.signs is not None:
            negative = negative_lanes(e, piece.signs)
            points = e.builder.sub(e.builder.xor(points, negative), negative)
        yield points


def _scaled(e: Emitter, type: GGMLType, block: Value, scales: list[Value]) -> Iterator[Value]:
    """The points of a block times scales, each of as many neighbouring points as the others."""
    for number, points in enumerate(_points(e, type, block)):
        scale = scales[number * len(scales) * LANES // type.block_size]
        yield e.multiply(e.signed_to_float(points), e.splat(scale))


def _half_step_scale(e: Emitter, packed: Value, d: Value, unit: float) -> Value:
    """d (s + 1/2) · unit, s the upper four bits of an i32."""
    s = e.builder.uitofp(e.shift_right(packed, 28), F32)
    return e.multiply(e.multiply(d, e.builder.fadd(s, F32(0.5))), F32(unit))


def _iq2_xxs(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.half(block, 0)
    scales = [_half_step_scale(e, e.load(block, I32, at), d, 0.25) for at in range(6, 70, 8)]
    yield from _scaled(e, GGMLType.IQ2_XXS, block, scales)


def _iq3_xxs(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.half(block, 0)
    scales = [_half_step_scale(e, e.load(block, I32, at), d, 0.5) for at in range(66, 98, 4)]
    yield from _scaled(e, GGMLType.IQ3_XXS, block, scales)


def _sixteen_scales(e: Emitter, block: Value, offset: int) -> list[Value]:
    """d (s + 1/2) / 4 for the 16 numbers s in the half bytes at an offset."""
    d = e.half(block, 0)
    scales = []
    for byte in range(8):
        packed = wide(e, block, I8, offset + byte, I32)
        for s in (e.mask(packed, 15), e.shift_right(packed, 4)):
            half_steps = e.builder.fadd(e.builder.uitofp(s, F32), F32(0.5))
            scales.append(e.multiply(e.multiply(d, half_steps), F32(0.25)))
    return scales


def _iq2_xs(e: Emitter, block: Value) -> Iterator[Value]:
    yield from _scaled(e, GGMLType.IQ2_XS, block, _sixteen_scales(e, block, 66))


def _iq2_s(e: Emitter, block: Value) -> Iterator[Value]:
    yield from _scaled(e, GGMLType.IQ2_S, block, _sixteen_scales(e, block, 74))


def _iq3_s(e: Emitter, block: Value) -> Iterator[Value]:
    d, scales = e.half(block, 0), []
    for group in range(8):
        s = e.move_bits(wide(e, block, I8, 106 + group // 2, I32), 15, 4 * (group % 2), 1)
        scales.append(e.multiply(d, e.builder.uitofp(e.either(s, I32(1)), F32)))
    yield from _scaled(e, GGMLType.IQ3_S, block, scales)


def _shift(e: Emitter, taken_away: Value) -> Value:
    """1/8, or -1/8 where a number is not 0."""
    is_set = e.builder.icmp_unsigned("!=", taken_away, e.const(taken_away, 0))
    return e.builder.select(is_set, F32(float(-IQ1_DELTA)), F32(float(IQ1_DELTA)))


def _odd_scale(e: Emitter, d: Value, three_bits: Value) -> Value:
    """d (2 s + 1)."""
    return e.multiply(d, e.builder.uitofp(e.either(e.shift_left(three_bits, 1), I32(1)), F32))


def _iq1_s(e: Emitter, block: Value) -> Iterator[Value]:
    d = e.half(block, 0)
    for number, points in enumerate(_points(e, GGMLType.IQ1_S, block)):
        word = wide(e, block, I16, 34 + 2 * (number // 2), I32)
        scale = e.splat(_odd_scale(e, d, e.mask(e.shift_right(word, 12), 7)))
        shift = e.splat(_shift(e, e.mask(word, 0x8000)))
        yield e.multiply(e.builder.fadd(e.signed_to_float(points), shift), scale)


def _iq1_m(e: Emitter, block: Value) -> Iterator[Value]:
    words = [wide(e, block, I16, 48 + 2 * i, I32) for i in range(4)]
    bits = e.shift_right(words[0], 12)
    for i, word in enumerate(words[1:], 1):
        bits = e.either(bits, e.shift_left(e.shift_right(word, 12), 4 * i))
    d = e.half_to_float(e.builder.trunc(bits, I16))
    for group, points in enumerate(_points(e, GGMLType.IQ1_M, block)):
        scale = e.splat(_odd_scale(e, d, e.mask(e.shift_right(words[group // 4], 3 * (group % 4)), 7)))
        high = wide(e, block, I8, 32 + group)
        shifts = [e.splat(_shift(e, e.mask(high, 8 << 4 * i)), 8) for i in range(2)]
        both = e.builder.shuffle_vector(*shifts, ir.Constant(vector(I32), list(range(LANES))))
        yield e.multiply(e.builder.fadd(e.signed_to_float(points), both), scale)


register(GGMLType.IQ2_XXS, _iq2_xxs)
register(GGMLType.IQ2_XS, _iq2_xs)
register(GGMLType.IQ2_S, _iq2_s)
register(GGMLType.IQ3_XXS, _iq3_xxs)
register(GGMLType.IQ3_S, _iq3_s)
register(GGMLType.IQ1_S, _iq1_s)
register(GGMLType.IQ1_M, _iq1_m)
