"""One group of 32 columns in registers: what loops for one row (rows.py) and for many (tiles.py) share.

With activations of 8 bits a group adds
    scale · sum(q_w · q_x) · d      and      m · d · sum(q_x)
to two float32 sums of a row (activations.py says what d and q_x are); offsets are in m, as minima are. With more it is
    factor · sum((q_w - offset) · q_x) · d
for all groups of a block, then their sum times scale. The inner sums, factors included, are exact integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from engine.cpu.kernels.emit import F32, I32, Emitter, Value
from engine.cpu.kernels.integer.activations import LINES, Line
from engine.cpu.kernels.integer.panels import FLOATS, PANELS, STEPS, Group, Panel
from engine.cpu.kernels.isa import ISAS, ROWS, V8, V16, V32, Isa
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
            return self.isa.for_16_bits(tiles=tiles or self.panel.wide)
        return self.isa.for_tiles(self.panel.largest) if tiles else self.isa

    @property
    def n_scales(self) -> int:
        """Scales of a group."""
        in_scales = self.bits == 8 and not self.panel.late
        return self.panel.n_factors if in_scales and self.panel.n_factors else self.panel.n_scales

    @property
    def n_factors(self) -> int:
        """Factors of a group, which multiply sums of integers."""
        return self.panel.n_factors if self.bits > 8 or self.panel.late else 0

    def n_mins(self, isa: type[Isa]) -> int:
        """Minima of a group as an instruction set multiplies it."""
        if self.bits == 8 and self.panel.offset(isa):
            return max(self.panel.n_scales, self.panel.n_factors)
        return self.panel.n_mins

    @property
    def block_scale(self) -> bool:
        """Whether a block's sum is multiplied by its scale, not each group's."""
        return self.bits > 8 and self.panel.n_scales == 1

    def offset(self, isa: type[Isa]) -> int:
        """What activations of more than 8 bits take away from q, or from 2 q where `twice` says so."""
        return int(self.panel.offset(isa) * (1 + self.panel.twice))


def span_steps(isa: type[Isa], largest: int, steps: int) -> int:
    """Steps whose products are added before the sum is brought to 32 bits: `steps` or its half, quarter, ..."""
    while steps > isa.most(largest):
        steps //= 2
    return steps


def smaller(builder: Any, a: Value, b: Value) -> Value:
    """The smaller of two integers."""
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def float_at(e: Emitter, address: Value, offset: int) -> Value:
    """A float32 in all lanes."""
    return e.splat(e.load(address, F32, offset, align=4), ROWS)


def zeros(kind: ir.Type) -> Value:
    """A vector of zeros."""
    return ir.Constant(kind, [0] * kind.count)


def broadcast(e: Emitter, line: Value, step: int) -> Value:
    """Four activations in all lanes."""
    return e.builder.bitcast(e.splat(e.load(line, I32, 4 * step), ROWS), V8)


def add_minima(e: Emitter, kind: Kind, mins: tuple[Value, ...], line: Value, least: Value) -> Value:
    """The float sum of minima after one more group."""
    for minimum, place in zip(mins, kind.line.places(kind.line.sums, len(mins)), strict=False):
        least = e.multiply_add(minimum, float_at(e, line, place), least)
    return least


def hold(e: Emitter) -> None:
    """Keeps LLVM from moving loads across this place; costs no instruction.

    Left alone, it would load and unpack much more than there are registers for before it multiplies anything.
    """
    e.builder.fence("seq_cst", targetscope="singlethread")


def group_sums(e: Emitter, kind: Kind, group: Group, line: Value) -> list[Value]:
    """The integer sums of a group times one row of activations, 8 × i32."""
    return {8: _sums_of_8, 14: _sums_of_14, 16: _sums_of_16}[kind.bits](e, kind, group, line)


def _sums_of_8(e: Emitter, kind: Kind, group: Group, line: Value) -> list[Value]:
    """One for each scale."""
    isa = kind.arithmetic(tiles=False)
    largest, parts = kind.panel.largest, max(kind.n_scales, kind.n_factors)
    arithmetic, span = isa(e, largest), span_steps(isa, largest, STEPS // parts)
    totals: list[Value | None] = [None] * len(group.scales)
    for first in range(0, STEPS, span):
        part = zeros(isa.accumulator)
        for step in range(first, first + span):
            if step % STEPS_AT_ONCE == 0:
                hold(e)
            part = arithmetic.add(part, group.steps[step], broadcast(e, line, step))
        factor = isa.factor(e, group.factors[first * len(group.factors) // STEPS]) if group.factors else None
        part = arithmetic.finish(part, factor)
        which = first * len(totals) // STEPS
        total = totals[which]
        totals[which] = part if total is None else e.builder.add(total, part)
    return totals


def _sums_of_16(e: Emitter, kind: Kind, group: Group, line: Value) -> list[Value]:
    """panel.n_sums of them, offsets taken away and factors applied."""
    b, panel, isa = e.builder, kind.panel, kind.arithmetic(tiles=False)
    arithmetic, offset, count = isa(e, panel.largest), kind.offset(isa), max(len(group.factors), panel.n_sums)
    assert kind.line.counts is not None
    # A chain for each plane of bytes or each half of a pair, and two where chains of a whole group would be waited for.
    split, chains = isa.columns == 4, 2 // count
    totals = []
    for which, place in enumerate(kind.line.places(kind.line.counts, count)):
        start = zeros(V32)
        if offset:
            start = e.splat(b.mul(e.load(line, I32, place, align=4), I32(-offset)), ROWS)
        sums = [[zeros(V32)] * chains for _ in range(2)]
        sums[0][0] = zeros(V32) if panel.twice else start
        for step in range(which * STEPS // count, (which + 1) * STEPS // count):
            if step % STEPS_AT_ONCE == 0:
                hold(e)
            weights = group.steps[step]
            for number, part in enumerate((weights, weights) if split else widened(e, weights)):
                word = broadcast(e, line, STEPS * (1 - number) + step if split else 2 * step + number)
                chain, at = sums[number], step % chains
                chain[at] = arithmetic.add(chain[at], part, word if split else b.bitcast(word, V16))
        low, high = (chain[0] if chains == 1 else b.add(*chain) for chain in sums)
        total = b.add(low, e.shift_left(high, 8) if split else high)
        if panel.twice:
            total = b.add(b.add(total, total), start)
        totals.append(b.mul(total, group.factors[which * len(group.factors) // count]) if group.factors else total)
    return totals if len(totals) == panel.n_sums else [b.add(*totals)]


def _sums_of_14(e: Emitter, kind: Kind, group: Group, line: Value) -> list[Value]:
    """The sum of a group of a wide panel."""
    b, arithmetic = e.builder, kind.arithmetic(tiles=False)(e, kind.panel.largest)
    chains = [zeros(V32), zeros(V32)]  # one would be waited for
    for step, weights in enumerate(group.steps):
        if step % STEPS_AT_ONCE == 0:
            hold(e)
        chains[step % 2] = arithmetic.add(chains[step % 2], weights, b.bitcast(broadcast(e, line, step), V16))
    return [b.add(*chains)]


def add_group(
    e: Emitter, kind: Kind, sums: Sequence[Value], scales: Sequence[Value], factor: Value, total: Value | None
) -> Value:
    """The float sum after one more group: of a row, or of a block where its scale comes last (kind.block_scale).

    factor: the scale of the activations in all lanes; total: the sum before, None is 0.
    """
    dots = [e.builder.sitofp(part, FLOATS) for part in sums]
    if not kind.block_scale:
        dots[0] = e.multiply(dots[0], scales[0])
    product = dots[0]
    for index, dot in enumerate(dots[1:], 1):
        product = e.builder.fadd(product, dot) if kind.block_scale else e.multiply_add(dot, scales[index], product)
    return e.multiply(product, factor) if total is None else e.multiply_add(product, factor, total)


def widened(e: Emitter, step: Value) -> tuple[Value, Value]:
    """The bytes of a step as 16 bits: those in even, then those in odd places."""
    both = e.builder.bitcast(step, V16)
    eight = ir.Constant(V16, [8] * V16.count)
    return e.builder.ashr(e.builder.shl(both, eight), eight), e.builder.ashr(both, eight)
