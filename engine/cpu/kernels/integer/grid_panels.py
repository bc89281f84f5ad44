"""How the IQ formats with grids are read from panels (panels.py).

An index says nothing about a single column, and looking up eight points in one instruction takes as long as all other
work on 32 columns (6.5 cycles a VPGATHERDD on Zen 4). So blocks are recoded when they are packed: every column gets 2
to 4 bits that name its level. A copy takes 1.2 to 1.55 times the bytes of the file.

In the layouts below a plane of 2 bits is as in Q2_K and TQ2_0: 32 bytes hold 128 columns, byte i in its lowest bits
column i, above it column 32 + i, and so on. A plane of 1 bit is as in Q3_K: bit g of byte i is column 32 g + i.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from engine.cpu.kernels.emit import I16, I32, Emitter, Value, vector
from engine.cpu.kernels.formats.grids import PIECES, look_up_points, negative_lanes
from engine.cpu.kernels.integer.panels import STEPS, Block, Group, panel, write_plane
from engine.cpu.kernels.isa import ROWS, V8
from engine.gguf.formats.grids import grid
from engine.gguf.types import GGMLType

_LEVELS_2, _LEVELS_3 = (np.unique(grid(name)) for name in ("IQ2_XXS", "IQ3_XXS"))
"""The magnitudes of IQ2's coordinates (three) and of those of IQ3_XXS (eight)."""

_TWO_BITS, _SIGNS = 0, 64
"""Where planes begin."""


def _levels(name: str) -> npt.NDArray[np.uint8]:
    """The points of a grid by number of level, the smallest is 0."""
    points = grid(name)
    return np.searchsorted(np.unique(points), points).astype(np.uint8)


def _pieces(e: Emitter, type: GGMLType, block: Value) -> tuple[list[Value], list[Value]]:
    """Levels of a block, 16 columns each, and vectors that are -1 where a column is negative."""
    name = "IQ1_S" if type is GGMLType.IQ1_M else type.name
    pieces = list(PIECES[type.name](e, block))
    levels = [look_up_points(e, f"levels_{name}", _levels(name), piece.indices) for piece in pieces]
    return levels, [negative_lanes(e, piece.signs) for piece in pieces if piece.signs is not None]


def _upper_nibbles(e: Emitter, block: Value, kind: ir.IntType, places: Sequence[int]) -> Value:
    """The upper four bits of eight numbers of a kind side by side, as an i32."""
    word: Value = I32(0)
    for number, place in enumerate(places):
        four = e.shift_right(e.load(block, kind, place), kind.width - 4)
        word = e.either(word, e.shift_left(four if kind is I32 else e.builder.zext(four, I32), 4 * number))
    return word


def _odd(e: Emitter, words: Value, bits: int, shift: int) -> Value:
    """2 s + 1 for the number s of some bits (their mask) of each word."""
    return e.either(e.move_bits(words, bits, shift, 1), e.const(words, 1))


# IQ2: 0 plane of levels, 64 plane of signs, 96 scales of 4 bits (for 32 or 16 columns), then d.


def _recode_iq2(type: GGMLType, scales: int, e: Emitter, block: Value, target: Value) -> None:
    """`scales` is where the file has the scales of IQ2_XS and IQ2_S; those of IQ2_XXS are beside the signs."""
    levels, negative = _pieces(e, type, block)
    write_plane(e, 2, levels, target, _TWO_BITS)
    write_plane(e, 1, [e.mask(piece, 1) for piece in negative], target, _SIGNS)
    if type is GGMLType.IQ2_XXS:
        e.store(_upper_nibbles(e, block, I32, range(6, 70, 8)), target, 96)
    else:
        e.store(e.load(block, vector(I32, 2), scales), target, 96)
    e.store(e.load(block, I16), target, 100 if type is GGMLType.IQ2_XXS else 104, align=2)


_TOP_2 = int(_LEVELS_2[-1])
_TABLE_2 = tuple(_TOP_2 + sign * int(level) for sign in (1, -1) for level in (*_LEVELS_2, 0)) * 2


def _iq2_steps(k: Block, group: int) -> tuple[Value, ...]:
    """The weights of a group, shifted to be unsigned."""
    half, quarter = divmod(group, 4)
    return tuple(
        k.isa.look_up(
            k.e, _TABLE_2, k.either(k.field(k.word(8 * half + i), 2 * quarter, 3), k.field(k.word(16 + i), group, 1, 2))
        )
        for i in range(STEPS)
    )


@panel(
    GGMLType.IQ2_XXS,
    words=(range(0, 100, 4),),
    halves=(100,),
    largest=2 * _TOP_2,
    factors=1,
    largest_factor=31,
    zero=_TOP_2,
    recode=partial(_recode_iq2, GGMLType.IQ2_XXS, 0),
    copied=True,
)
def _iq2_xxs(k: Block) -> Iterator[Group]:
    eighth = k.times(k.half(0), 0.125)
    for group in range(8):
        yield Group(_iq2_steps(k, group), (eighth,), (_odd(k.e, k.word(24), 15, 4 * group),))


def _iq2_sixteens(k: Block) -> Iterator[Group]:
    eighth = k.times(k.half(0), 0.125)
    for group in range(8):
        odd = (_odd(k.e, k.word(24 + group // 4), 15, 8 * (group % 4) + 4 * part) for part in range(2))
        yield Group(_iq2_steps(k, group), (eighth,), tuple(odd))


for _type, _scales in ((GGMLType.IQ2_XS, 66), (GGMLType.IQ2_S, 74)):
    panel(
        _type,
        words=(range(0, 104, 4),),
        halves=(104,),
        largest=2 * _TOP_2,
        factors=2,
        largest_factor=31,
        zero=_TOP_2,
        recode=partial(_recode_iq2, _type, _scales),
        copied=True,
    )(_iq2_sixteens)


# IQ3: 0 plane of 4 bits (as in Q4_K: 32 bytes hold 64 columns), 128 scales of 4 bits for 32 columns, then d.
# Levels from 8 up are positive, and their complements the negative ones.


def _recode_iq3(type: GGMLType, e: Emitter, block: Value, target: Value) -> None:
    levels, negative = _pieces(e, type, block)
    signed = [
        e.builder.xor(e.either(level, e.const(level, 8)), e.mask(minus, 15))
        for level, minus in zip(levels, negative, strict=True)
    ]
    write_plane(e, 4, signed, target, 0)
    if type is GGMLType.IQ3_XXS:
        e.store(_upper_nibbles(e, block, I32, range(66, 98, 4)), target, 128)
    else:
        e.store(e.load(block, I32, 106), target, 128)
    e.store(e.load(block, I16), target, 132, align=2)


def _iq3_nibbles(k: Block, group: int, up: int = 0) -> tuple[Value, ...]:
    pair, half = divmod(group, 2)
    return tuple(k.field(k.word(8 * pair + i), 4 * half, 15, up) for i in range(STEPS))


_TOP_3 = int(_LEVELS_3[-1])
_TABLE_3 = (*(_TOP_3 - int(level) for level in _LEVELS_3[::-1]), *(_TOP_3 + int(level) for level in _LEVELS_3))


@panel(
    GGMLType.IQ3_XXS,
    words=(range(0, 132, 4),),
    halves=(132,),
    largest=2 * _TOP_3,
    factors=1,
    largest_factor=31,
    zero=_TOP_3,
    recode=partial(_recode_iq3, GGMLType.IQ3_XXS),
    copied=True,
)
def _iq3_xxs(k: Block) -> Iterator[Group]:
    quarter = k.times(k.half(0), 0.25)
    for group in range(8):
        steps = tuple(k.isa.look_up(k.e, _TABLE_3, nibbles) for nibbles in _iq3_nibbles(k, group))
        yield Group(steps, (quarter,), (_odd(k.e, k.word(32), 15, 4 * group),))


@panel(
    GGMLType.IQ3_S,
    words=(range(0, 132, 4),),
    halves=(132,),
    largest=30,
    factors=1,
    largest_factor=31,
    zero=15,
    recode=partial(_recode_iq3, GGMLType.IQ3_S),
    copied=True,
)
def _iq3_s(k: Block) -> Iterator[Group]:
    # The levels are the odd numbers from -15 to 15.
    d = k.half(0)
    for group in range(8):
        yield Group(_iq3_nibbles(k, group, 1), (d,), (_odd(k.e, k.word(32), 15, 4 * group),))


# IQ1_S: 0 plane of levels (0, 1, 2), 64 for each 32 columns 3 bits of scale and in the fourth whether 1/8 is taken
# away, 68 d. IQ1_M: 0 plane of levels, 64 one bit for each 8 columns, set where 1/8 is added, 68 `scales` of the file.


def _recode_iq1_s(e: Emitter, block: Value, target: Value) -> None:
    write_plane(e, 2, _pieces(e, GGMLType.IQ1_S, block)[0], target, _TWO_BITS)
    e.store(_upper_nibbles(e, block, I16, range(34, 50, 2)), target, 64)
    e.store(e.load(block, I16), target, 68, align=2)


@panel(
    GGMLType.IQ1_S,
    words=(range(0, 68, 4),),
    halves=(68,),
    largest=2,
    factors=1,
    mins=1,
    largest_factor=15,
    recode=_recode_iq1_s,
    copied=True,
)
def _iq1_s(k: Block) -> Iterator[Group]:
    d, word = k.half(0), k.word(16)
    for group in range(8):
        odd = _odd(k.e, word, 7, 4 * group)
        scale = k.times(k.number(odd), d)
        taken_away = k.number(k.e.move_bits(word, 1, 4 * group + 3, 0))
        shift = k.e.multiply_add(taken_away, k.e.const(scale, -0.25), k.e.const(scale, -0.875))
        yield Group(k.twos(8 * (group // 4), group % 4), (d,), (odd,), (k.times(scale, shift),))


def _recode_iq1_m(e: Emitter, block: Value, target: Value) -> None:
    write_plane(e, 2, _pieces(e, GGMLType.IQ1_M, block)[0], target, _TWO_BITS)
    high = e.bytes(block, 32)
    order = [lane // 2 + 16 * (lane % 2) for lane in range(32)]
    nibbles = e.builder.shuffle_vector(e.mask(high, 8), e.mask(high, 0x80), ir.Constant(vector(I32, len(order)), order))
    added = e.builder.icmp_unsigned("==", nibbles, e.const(nibbles, 0))
    e.store(e.builder.bitcast(added, I32), target, 64)
    e.store(e.load(block, vector(I32, 2), 48), target, 68)


@panel(
    GGMLType.IQ1_M,
    words=(range(0, 76, 4),),
    largest=18,
    factors=2,
    largest_factor=15,
    zero=9,
    recode=_recode_iq1_m,
    copied=True,
)
def _iq1_m(k: Block) -> Iterator[Group]:
    """Eight times (level - 1 ± 1/8) is 8 level - 9, and 2 more where 1/8 is added."""
    e, added, scales = k.e, k.word(16), (k.word(17), k.word(18))
    d = e.const(added, 0)
    for number in range(4):
        # Four bits of d are above 12 bits of scales.
        up, down = 4 * number, 16 * (number % 2) + 12
        d = k.either(d, e.move_bits(scales[number // 2], 15, down, up))
    eighth = k.times(e.half_to_float(e.builder.trunc(d, vector(I16, ROWS))), 0.125)
    for group in range(8):
        steps: list[Value] = []
        for eight in range(4):
            spread = e.builder.ashr(e.shift_left(added, 31 - 4 * group - eight), e.const(added, 31))
            two = e.builder.bitcast(e.mask(spread, 0x02020202), V8)
            words = (k.word(8 * (group // 4) + 2 * eight + i) for i in range(2))
            steps += (k.either(k.field(word, 2 * (group % 4), 3, 3), two) for word in words)
        word, first = scales[group // 4], 16 * (group // 2 % 2) + 6 * (group % 2)
        yield Group(tuple(steps), (eighth,), tuple(_odd(e, word, 7, first + 3 * part) for part in range(2)))
