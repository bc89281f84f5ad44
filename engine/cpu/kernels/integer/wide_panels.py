"""How F16 and BF16 become numbers of 16 bits in panels (panels.py).

A block has 64 columns, q = w / 2 ** n, where the power brings the largest magnitude of the block to 2 ** 12 at least
and below 2 ** 13. F16 has 11 bits: q is exact for weights above a quarter of that power, and the others are rounded to
at most 2 ** -13 of it; BF16 has 8, so q is exact above a 32nd. Multiplied in pairs, like the activations of 14 bits
beside them, such numbers take half the instructions of float32, and a group's sum fits into 32 bits.
"""

from collections.abc import Callable, Iterator
from functools import partial

from engine.cpu.kernels.emit import F32, I8, I16, I32, LANES, Emitter, Value, vector
from engine.cpu.kernels.formats.decoders import power_of_two
from engine.cpu.kernels.integer.panels import HIGHEST_14, WIDE_BLOCK, WIDE_STEPS, Block, Group, panel
from engine.cpu.kernels.isa import V16
from engine.gguf.types import GGMLType

_ROUNDER = 12582912.0
"""1.5 * 2 ** 23: a sum with it has the nearest integer in its low bits."""


_LOWEST = 16
"""Least exponent, as float32 has it, that blocks have: 2 ** (12 - exponent) is a float32 for it."""


def _recode(to_float: Callable[[Emitter, Value], Value], e: Emitter, block: Value, target: Value) -> None:
    """Writes 64 numbers q, then n + 128 as a byte; 255 where a weight is not finite, so that products are not."""
    b, whole = e.builder, vector(I32)
    parts = [to_float(e, e.load(block, vector(I16), 2 * LANES * i)) for i in range(WIDE_BLOCK // LANES)]
    # Magnitudes of floats have the order of their bits.
    largest = e.mask(b.bitcast(parts[0], whole), 0x7FFFFFFF)
    for part in parts[1:]:
        largest = _more(e, largest, e.mask(b.bitcast(part, whole), 0x7FFFFFFF))
    while largest.type.count > 1:
        half = largest.type.count // 2
        largest = _more(e, e.part(largest, 0, half), e.part(largest, half, half))
    top = e.shift_right(b.extract_element(largest, I32(0)), 23)  # 127 + its exponent, 0 for 0
    top = b.select(b.icmp_unsigned("<", e.minus(top, 1), I32(_LOWEST - 1)), I32(_LOWEST), top)
    factor = b.bitcast(e.shift_left(b.sub(I32(127 + 12 + 127), top), 23), F32)
    for i, part in enumerate(parts):
        bits = b.bitcast(b.fadd(e.multiply(part, e.splat(factor)), e.const(part, _ROUNDER)), whole)
        e.store(b.trunc(bits, vector(I16)), target, 2 * LANES * i, align=1)
    power = b.select(b.icmp_signed("==", top, I32(255)), I32(255), e.minus(top, 127 + 12 - 128))
    power = b.select(b.icmp_signed("==", top, I32(0)), I32(0), power)
    e.store(b.trunc(power, I8), target, 2 * WIDE_BLOCK, align=1)


def _more(e: Emitter, a: Value, c: Value) -> Value:
    """The larger of two integers, lane by lane."""
    return e.builder.select(e.builder.icmp_signed(">", a, c), a, c)


def _wide(k: Block) -> Iterator[Group]:
    code = k.byte()
    finite = k.e.builder.icmp_signed("!=", code, k.e.const(code, 255))
    scale = power_of_two(k.e, code)
    scale = k.e.builder.select(finite, scale, k.e.const(scale, float("nan")))
    for first in range(0, WIDE_BLOCK // 2, WIDE_STEPS):
        yield Group(tuple(k.e.builder.bitcast(k.word(first + i), V16) for i in range(WIDE_STEPS)), (scale,))


for _type, _to_float in ((GGMLType.F16, Emitter.half_to_float), (GGMLType.BF16, Emitter.brain_to_float)):
    panel(
        _type,
        words=(range(0, 2 * WIDE_BLOCK, 4),),
        byte=2 * WIDE_BLOCK,
        largest=HIGHEST_14,
        recode=partial(_recode, _to_float),
        copied=True,
        near=True,
        wide=True,
    )(_wide)
