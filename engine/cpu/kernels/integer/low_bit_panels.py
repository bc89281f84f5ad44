"""How formats of one or two bits, and NVFP4, are read from panels (panels.py).

A panel wants column 4 s + c of a group in byte c of a step. Where files have columns in another order, blocks are
recoded when they are packed: trits as numbers of 2 bits (1.22 times the bytes), the others in as many bytes.
"""

from collections.abc import Iterator

from engine.cpu.kernels.emit import I16, I32, Emitter, Value, vector
from engine.cpu.kernels.formats.decoders import MXFP4_VALUES
from engine.cpu.kernels.formats.low_bits import trits
from engine.cpu.kernels.integer.panels import STEPS, Block, Group, panel, spread_bits, write_plane
from engine.cpu.kernels.isa import ROWS
from engine.gguf.types import GGMLType


def _recode_tq1_0(e: Emitter, block: Value, target: Value) -> None:
    """Writes a block of TQ2_0."""
    write_plane(e, 2, list(trits(e, block)), target, 0)
    e.store(e.load(block, I16, 52), target, 64, align=2)


def _ternary(k: Block) -> Iterator[Group]:
    d = k.half(0)
    for group in range(8):
        yield Group(k.twos(8 * (group // 4), group % 4), (d,))


panel(GGMLType.TQ1_0, words=(range(0, 64, 4),), halves=(64,), largest=2, zero=1, recode=_recode_tq1_0)(_ternary)
panel(GGMLType.TQ2_0, words=(range(0, 64, 4),), halves=(64,), largest=3, zero=1)(_ternary)


def _recode_q1_0(e: Emitter, block: Value, target: Value) -> None:
    """Puts the bits of a group where its steps find them."""
    e.store(e.load(block, I16), target, align=2)
    e.store(spread_bits(e, e.load(block, vector(I32, 4), 2)), target, 2, align=2)


@panel(GGMLType.Q1_0, words=(range(2, 18, 4),), halves=(0,), largest=2, zero=1, recode=_recode_q1_0)
def _q1_0(k: Block) -> Iterator[Group]:
    d = k.half(0)
    for group in range(4):
        word = k.word(group)
        steps = tuple(k.field(word, step, 1, 1) for step in range(STEPS))
        yield Group(steps, (d,))


def _recode_q2_0(e: Emitter, block: Value, target: Value) -> None:
    """Turns 4 x 4 numbers of 2 bits, four in a byte, so that numbers side by side are in different bytes."""
    b, words = e.builder, e.load(block, vector(I32, 4), 2)
    # Exchanges the numbers at the places of `mask` with those `shift` bits above.
    for shift, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):
        differing = e.mask(b.xor(e.shift_right(words, shift), words), mask)
        words = b.xor(words, e.either(differing, e.shift_left(differing, shift)))
    e.store(e.load(block, I16), target, align=2)
    e.store(words, target, 2, align=2)


@panel(GGMLType.Q2_0, words=(range(2, 18, 4),), halves=(0,), largest=3, zero=1, recode=_recode_q2_0)
def _q2_0(k: Block) -> Iterator[Group]:
    d = k.half(0)
    for group in range(2):
        words = [k.word(2 * group + half) for half in range(2)]
        steps = tuple(k.field(words[step // 4], 2 * (step % 4), 3) for step in range(STEPS))
        yield Group(steps, (d,))


def _ue4m3_halved(k: Block, code: Value) -> Value:
    """Half of scales of 4 exponent and 3 mantissa bits, 8 × i32 to 8 × f32; the upper bit is ignored, 0x7F means 0."""
    nothing = k.e.builder.icmp_unsigned("==", code, k.e.const(code, 0x7F))
    code = k.e.builder.select(nothing, k.e.const(code, 0), k.e.mask(code, 0x7F))
    # As float16 they are 2 ** 8 times smaller.
    halves = k.e.builder.trunc(k.e.shift_left(code, 7), vector(I16, ROWS))
    return k.times(k.e.half_to_float(halves), 128.0)


_TABLE = tuple(value + 12 for value in MXFP4_VALUES)


@panel(GGMLType.NVFP4, words=(range(0, 36, 4),), largest=24, scales=2, zero=12)
def _nvfp4(k: Block) -> Iterator[Group]:
    codes = k.word(0)
    for group in range(2):
        scales = tuple(_ue4m3_halved(k, k.pick(codes, 2 * group + part)) for part in range(2))
        words = [k.word(1 + 4 * group + i) for i in range(4)]
        # 16 columns are the low, then the high halves of 8 bytes.
        nibbles = (k.field(words[2 * part + i], shift, 15) for part in range(2) for shift in (0, 4) for i in range(2))
        steps = tuple(k.isa.look_up(k.e, _TABLE, four) for four in nibbles)
        yield Group(steps, scales)
