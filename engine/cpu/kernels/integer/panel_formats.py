"""How each block format is read from panels (panels.py).

The byte layouts of the formats are drawn in engine/gguf, beside the class of each.
"""

from collections.abc import Iterator

from engine.cpu.kernels.emit import Value
from engine.cpu.kernels.formats.decoders import IQ4_VALUES, MXFP4_VALUES, power_of_two
from engine.cpu.kernels.integer.panels import STEPS, Block, Group, panel
from engine.cpu.kernels.isa import V8, V32
from engine.gguf.types import GGMLType


def _nibbles(k: Block, first: int) -> tuple[Value, ...]:
    """32 numbers of 4 bits in 16 bytes, low halves first, from word `first` on."""
    words = [k.word(first + i) for i in range(4)]
    return tuple(k.field(word, shift, 15) for shift in (0, 4) for word in words)


@panel(GGMLType.Q4_0, words=(range(2, 18, 4),), halves=(0,), largest=15, zero=8, near=True)
def _q4_0(k: Block) -> Iterator[Group]:
    yield Group(_nibbles(k, 0), (k.half(0),))


@panel(GGMLType.Q4_1, words=(range(4, 20, 4),), halves=(0, 2), largest=15, mins=1, near=True)
def _q4_1(k: Block) -> Iterator[Group]:
    yield Group(_nibbles(k, 0), (k.half(0),), mins=(k.half(1),))


def _with_fifths(k: Block) -> tuple[Value, ...]:
    fifths = k.word(0)
    return tuple(k.either(low, k.field(fifths, step, 1, 4)) for step, low in enumerate(_nibbles(k, 1)))


@panel(GGMLType.Q5_0, words=(range(2, 22, 4),), halves=(0,), largest=31, zero=16, spread=0, near=True)
def _q5_0(k: Block) -> Iterator[Group]:
    yield Group(_with_fifths(k), (k.half(0),))


@panel(GGMLType.Q5_1, words=(range(4, 24, 4),), halves=(0, 2), largest=31, mins=1, spread=0, near=True)
def _q5_1(k: Block) -> Iterator[Group]:
    yield Group(_with_fifths(k), (k.half(0),), mins=(k.half(1),))


@panel(GGMLType.Q8_0, words=(range(2, 34, 4),), halves=(0,), largest=128, near=True)
def _q8_0(k: Block) -> Iterator[Group]:
    yield k.signed(tuple(k.e.builder.bitcast(k.word(i), V8) for i in range(STEPS)), k.half(0))


@panel(GGMLType.IQ4_NL, words=(range(2, 18, 4),), halves=(0,), largest=128)
def _iq4_nl(k: Block) -> Iterator[Group]:
    yield k.signed(tuple(k.isa.look_up(k.e, IQ4_VALUES, q) for q in _nibbles(k, 0)), k.half(0))


@panel(GGMLType.IQ4_XS, words=(range(4, 136, 4),), halves=(0, 2), largest=128, factors=1, largest_factor=32)
def _iq4_xs(k: Block) -> Iterator[Group]:
    d, low = k.half(0), k.word(0)
    high = k.e.builder.zext(k.bits16(1), V32)
    for group in range(8):
        four = k.e.mask(k.e.shift_right(low, 4 * group), 15)
        scale = k.e.minus(k.either(four, k.e.move_bits(high, 3, 2 * group, 4)), 32)
        steps = tuple(k.isa.look_up(k.e, IQ4_VALUES, q) for q in _nibbles(k, 1 + 4 * group))
        yield k.signed(steps, d, scale)


@panel(GGMLType.MXFP4, words=(range(1, 17, 4),), byte=0, largest=24, zero=12)
def _mxfp4(k: Block) -> Iterator[Group]:
    scale = power_of_two(k.e, k.byte())
    table = [value + 12 for value in MXFP4_VALUES]
    steps = tuple(k.isa.look_up(k.e, table, q) for q in _nibbles(k, 0))
    yield Group(steps, (scale,))


@panel(GGMLType.Q2_K, words=(range(0, 80, 4),), halves=(80, 82), largest=3, factors=2, mins=2, largest_factor=15)
def _q2_k(k: Block) -> Iterator[Group]:
    d, dmin = k.half(0), k.times(k.half(1), -1.0)
    for half in range(2):
        for group in range(4):
            word = k.word(2 * half + group // 2)
            both = [k.pick(word, 2 * (group % 2) + part) for part in range(2)]
            factors = tuple(k.e.mask(one, 15) for one in both)
            mins = tuple(k.times(k.number(k.e.shift_right(one, 4)), dmin) for one in both)
            yield Group(k.twos(4 + 8 * half, group), (d,), factors, mins)


@panel(GGMLType.Q3_K, words=(range(0, 108, 4),), halves=(108,), largest=7, factors=2, largest_factor=32, zero=4)
def _q3_k(k: Block) -> Iterator[Group]:
    e, d = k.e, k.half(0)
    low, high = (k.word(24), k.word(25)), k.word(26)
    scales = [
        k.either(e.move_bits(low[i % 2], 0x0F0F0F0F, 4 * (i // 2), 0), e.move_bits(high, 0x03030303, 2 * i, 4))
        for i in range(4)
    ]
    for half in range(2):
        for group in range(4):
            word = scales[2 * half + group // 2]
            factors = tuple(e.minus(k.pick(word, 2 * (group % 2) + part), 32) for part in range(2))
            steps = tuple(
                k.either(k.field(k.word(8 + 8 * half + i), 2 * group, 3), k.field(k.word(i), 4 * half + group, 1, 2))
                for i in range(STEPS)
            )
            yield Group(steps, (d,), factors)


def _six_bits(k: Block) -> tuple[tuple[Value, Value], tuple[Value, Value]]:
    """The eight scales and eight minima that Q4_K and Q5_K pack into three words."""
    first, second, third = (k.word(i) for i in range(3))
    move = k.e.move_bits
    scales = k.e.mask(first, 0x3F3F3F3F), k.either(k.e.mask(third, 0x0F0F0F0F), move(first, 0x03030303, 6, 4))
    mins = (
        k.e.mask(second, 0x3F3F3F3F),
        k.either(move(third, 0x0F0F0F0F, 4, 0), move(second, 0x03030303, 6, 4)),
    )
    return scales, mins


def _with_minima(k: Block, quants: int, fifths: int | None) -> Iterator[Group]:
    """Groups of Q4_K and Q5_K; `quants` and `fifths` are the first words of each."""
    d, dmin = k.half(0), k.times(k.half(1), -1.0)
    scales, mins = _six_bits(k)
    for group in range(8):
        scale, least = (k.pick(pair[group // 4], group % 4) for pair in (scales, mins))
        words = [k.word(quants + 8 * (group // 2) + i) for i in range(STEPS)]
        steps = tuple(k.field(word, 4 * (group % 2), 15) for word in words)
        if fifths is not None:
            high = (k.field(k.word(fifths + i), group, 1, 4) for i in range(STEPS))
            steps = tuple(k.either(step, bit) for step, bit in zip(steps, high, strict=True))
        yield Group(steps, (d,), (scale,), (k.times(k.number(least), dmin),))


@panel(
    GGMLType.Q4_K, words=(range(4, 144, 4),), halves=(0, 2), largest=15, factors=1, mins=1, largest_factor=63, near=True
)
def _q4_k(k: Block) -> Iterator[Group]:
    yield from _with_minima(k, 3, None)


@panel(
    GGMLType.Q5_K, words=(range(4, 176, 4),), halves=(0, 2), largest=31, factors=1, mins=1, largest_factor=63, near=True
)
def _q5_k(k: Block) -> Iterator[Group]:
    yield from _with_minima(k, 11, 3)


@panel(
    GGMLType.Q6_K,
    words=(range(0, 208, 4),),
    halves=(208,),
    largest=63,
    factors=2,
    largest_factor=128,
    zero=32,
)
def _q6_k(k: Block) -> Iterator[Group]:
    d = k.half(0)
    for half in range(2):
        for group in range(4):
            word = k.word(48 + 2 * half + group // 2)
            factors = tuple(k.pick_signed(word, 2 * (group % 2) + part) for part in range(2))
            steps = tuple(
                k.either(
                    k.field(k.word(16 * half + 8 * (group % 2) + i), 4 * (group // 2), 15),
                    k.field(k.word(32 + 8 * half + i), 2 * group, 3, 4),
                )
                for i in range(STEPS)
            )
            yield Group(steps, (d,), factors)
