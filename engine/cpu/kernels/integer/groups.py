"""One group of 32 columns in registers: what loops for one row (rows.py) and for many (tiles.py) share.

A group adds
    factor · sum((q_w - offset) · q_x) · d      and      m · d · sum(q_x)
to two float32 sums (activations.py says what d and q_x are): the first to that of the block, which is multiplied by the
scale that its groups share and added to that of the row. The inner sums, offset and factor included, are exact
integers, so all instruction sets give the same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from engine.cpu.kernels.emit import F32, I8, I32, Emitter, Value, vector
from engine.cpu.kernels.integer.activations import LINES, Line
from engine.cpu.kernels.integer.panels import PANELS, STEPS, Group, Panel
from engine.cpu.kernels.isa import ISAS, ROWS, V16, V32, Isa
from engine.cpu.kernels.stepping import format_name

STEPS_AT_ONCE = 2
"""Steps between two places that loads may not cross."""


@dataclass(frozen=True)
class Kind:
    """What a kernel's type says: format and instructions, as "Q4_K/avx2".

    "/16" behind it means activations of 16 bits; "/rows" that the kernel reads rows in the order of the file and packs
    each block before it multiplies it. Wide panels have activations of 14 bits.
    """

    panel: Panel
    isa: type[Isa]
    bits: int
    from_rows: bool

    @classmethod
    def of(cls, name: types.StringLiteral) -> "Kind":
        """The meaning of a kernel's type."""
        format, isa, *rest = format_name(name).split("/")
        panel = PANELS[format]
        return cls(panel, ISAS[isa], 14 if panel.wide else 16 if "16" in rest else 8, "rows" in rest)

    @property
    def line(self) -> Line:
        """Blocks of activations."""
        return LINES[self.bits]

    def arithmetic(self, *, tiles: bool) -> type[Isa]:
        """How numbers are multiplied."""
        if self.bits > 8:
            isa = self.isa.for_16_bits(tiles=tiles or self.panel.wide)
            return isa if tiles else isa.of_one_panel()
        return self.isa.for_tiles(self.panel.largest, halves=self.panel.has_halves) if tiles else self.isa

    @property
    def n_sums(self) -> int:
        """Sums of integers of a group that become floats."""
        return self.panel.n_sums(self.line.largest)

    @property
    def block_scale(self) -> bool:
        """Whether a block's sum is multiplied by its scale, not each group's."""
        return self.panel.n_scales == 1


def smaller(builder: Any, a: Value, b: Value) -> Value:
    """The smaller of two integers."""
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def float_at(e: Emitter, address: Value, offset: int, lanes: int = ROWS) -> Value:
    """A float32 in all lanes."""
    return e.splat(e.load(address, F32, offset, align=4), lanes)


def zeros(kind: ir.Type) -> Value:
    """A vector of zeros."""
    return ir.Constant(kind, [0] * kind.count)


def broadcast(e: Emitter, line: Value, step: int, lanes: int = ROWS) -> Value:
    """Four activations in all lanes."""
    return e.builder.bitcast(e.splat(e.load(line, I32, 4 * step), lanes), vector(I8, 4 * lanes))


def add_minima(e: Emitter, kind: Kind, mins: tuple[Value, ...], line: Value, least: Value) -> Value:
    """The float sum of minima after one more group."""
    for minimum, place in zip(mins, kind.line.places(kind.line.sums, len(mins)), strict=False):
        least = e.multiply_add(minimum, float_at(e, line, place, least.type.count), least)
    return least


def hold(e: Emitter) -> None:
    """Keeps LLVM from moving loads across this place; costs no instruction.

    Left alone, it would load and unpack much more than there are registers for before it multiplies anything.
    """
    e.builder.fence("seq_cst", targetscope="singlethread")


def group_sums(e: Emitter, kind: Kind, group: Group, line: Value) -> list[Value]:
    """kind.n_sums integer sums of a group times one row of activations (8 × i32), offsets and factors applied."""
    b, panel, isa = e.builder, kind.panel, kind.arithmetic(tiles=False)
    arithmetic, offset, count = isa(e, panel.largest), panel.offset(isa), max(panel.n_factors, kind.n_sums)
    spans = {8: _spans_of_8, 14: _span_of_14, 16: _span_of_16}[kind.bits]
    whole = isa.span(STEPS // count, panel.largest, offset) == STEPS // count
    totals = []
    for which, place in enumerate(kind.line.places(kind.line.counts, count)):
        numbers = e.splat(e.load(line, I32, place, align=4), ROWS) if offset else None
        factor = isa.factor(e, group.factors[which * panel.n_factors // count]) if group.factors else None
        steps = range(which * STEPS // count, (which + 1) * STEPS // count)
        total = arithmetic.taken(numbers, offset, factor, whole=whole)
        start = arithmetic.begin(numbers, offset, halves=kind.line.halves, whole=whole)
        for part in spans(e, kind, group, line, steps, start):
            part = arithmetic.finish(part, factor)
            total = part if total is None else b.add(total, part)
        totals.append(total)
    return totals if count == kind.n_sums else [b.add(*totals)]


def _spans_of_8(e: Emitter, kind: Kind, group: Group, line: Value, steps: range, start: Value) -> Iterator[Value]:
    """Accumulators of these steps, as many as it takes; the first begins with `start`."""
    isa, largest = kind.arithmetic(tiles=False), kind.panel.largest
    arithmetic, span = isa(e, largest), isa.span(len(steps), largest, kind.panel.offset(isa))
    for first in steps[::span]:
        for step in range(first, first + span):
            if step % STEPS_AT_ONCE == 0:
                hold(e)
            start = arithmetic.add(start, group.steps[step], broadcast(e, line, step))
        yield start
        start = zeros(isa.accumulator)


def _span_of_16(e: Emitter, kind: Kind, group: Group, line: Value, steps: range, start: Value) -> Iterator[Value]:
    """The same, one sum for all."""
    b, isa = e.builder, kind.arithmetic(tiles=False)
    arithmetic = isa(e, kind.panel.largest)
    # A chain for each plane of bytes or each half of a pair, and two where chains of a whole group would be waited for.
    split, chains = isa.columns == 4, 2 * len(steps) // STEPS
    sums = [[zeros(V32)] * chains for _ in range(2)]
    sums[0][0] = start
    for step in steps:
        if step % STEPS_AT_ONCE == 0:
            hold(e)
        weights = group.steps[step]
        for number, part in enumerate((weights, weights) if split else widened(e, weights)):
            word = broadcast(e, line, STEPS * (1 - number) + step if split else 2 * step + number)
            chain, at = sums[number], step % chains
            chain[at] = arithmetic.add(chain[at], part, word if split else b.bitcast(word, V16))
    low, high = (chain[0] if chains == 1 else b.add(*chain) for chain in sums)
    yield b.add(low, e.shift_left(high, 8) if split else high)


def _span_of_14(e: Emitter, kind: Kind, group: Group, line: Value, steps: range, start: Value) -> Iterator[Value]:
    """The same for all steps of a group of a wide panel."""
    b, arithmetic = e.builder, kind.arithmetic(tiles=False)(e, kind.panel.largest)
    chains = [start, zeros(V32)]  # one would be waited for
    for step, weights in enumerate(group.steps):
        if step % STEPS_AT_ONCE == 0:
            hold(e)
        chains[step % 2] = arithmetic.add(chains[step % 2], weights, b.bitcast(broadcast(e, line, step), V16))
    yield b.add(*chains)


def add_group(
    e: Emitter, kind: Kind, sums: Sequence[Value], scales: Sequence[Value], factor: Value, total: Value | None
) -> Value:
    """The float sum after one more group: of a row, or of a block where its scale comes last (kind.block_scale).

    sums: integers, or the floats that equal them; factor: the scale of the activations in all lanes; total: the sum
    before, None is 0.
    """
    dots = [as_floats(e, part) for part in sums]
    if not kind.block_scale:
        dots[0] = e.multiply(dots[0], scales[0])
    product = dots[0]
    for index, dot in enumerate(dots[1:], 1):
        product = e.builder.fadd(product, dot) if kind.block_scale else e.multiply_add(dot, scales[index], product)
    return e.multiply(product, factor) if total is None else e.multiply_add(product, factor, total)


def as_floats(e: Emitter, numbers: Value) -> Value:
    """Integers as float32; floats as they are."""
    kind = vector(F32, numbers.type.count)
    return numbers if numbers.type == kind else e.builder.sitofp(numbers, kind)


def widened(e: Emitter, step: Value) -> tuple[Value, Value]:
    """The bytes of a step as 16 bits: those in even, then those in odd places."""
    both = e.builder.bitcast(step, V16)
    eight = ir.Constant(V16, [8] * V16.count)
    return e.builder.ashr(e.builder.shl(both, eight), eight), e.builder.ashr(both, eight)
