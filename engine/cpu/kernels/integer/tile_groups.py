"""Unpacked groups of panels in memory, and their products with the activations of some tokens (for tiles.py)."""

from itertools import chain
from typing import Any

from numba.core import cgutils

from engine.cpu.kernels.emit import I64, Emitter, Value
from engine.cpu.kernels.integer.activations import scaled
from engine.cpu.kernels.integer.groups import (
    Kind,
    add_group,
    add_minima,
    broadcast,
    float_at,
    hold,
    span_steps,
    widened,
    zeros,
)
from engine.cpu.kernels.integer.panels import FLOATS, GROUP, STEPS, Group
from engine.cpu.kernels.isa import BYTES, V8, V16, V32, Avx2


class Tile:
    """Unpacked groups in memory: vectors of weights, factors, scales and minima, 32 bytes each."""

    def __init__(self, e: Emitter, kind: Kind) -> None:
        self._e, self.kind, self.panel, self.isa = e, kind, kind.panel, kind.arithmetic(tiles=True)
        self.pairs = self.isa.columns == 2
        self.widens = self.pairs and kind.bits == 8
        self.n_steps = GROUP // self.isa.columns
        self.folds = kind.bits > 8 and self.pairs  # factors are part of the weights
        self.planes = 2 if kind.bits == 16 and not self.pairs else 1
        self.n_scales, self.n_mins = kind.n_scales, kind.n_mins(self.isa)
        self.n_factors = 0 if self.folds else kind.n_factors
        # Sums of integers of a group, and how many they are when halves have been joined.
        self.n_sums = kind.panel.n_sums if kind.bits > 8 else kind.n_scales
        self.n_parts = max(self.n_sums, self.n_factors) if self.planes == 2 else self.n_sums
        self.span_steps = span_steps(self.isa, self.panel.largest, self.n_steps // max(self.n_parts, self.n_factors, 1))
        self.group_bytes = BYTES * (self.n_steps + self.n_factors + self.n_scales + self.n_mins)

    def write(self, address: Value, group: Group) -> None:
        """Puts a group there."""
        e, steps, factors = self._e, list(group.steps), list(group.factors)
        if self.pairs and not self.panel.wide:
            both = [widened(e, step) for step in steps]
            # The order of activations: all even and all odd places, or even and odd ones of each step.
            steps = list(chain.from_iterable(zip(*both, strict=True) if self.widens else both))
        if self.kind.bits == 16:
            offset = self.kind.offset(self.isa)
            steps = [e.builder.add(step, step) if self.panel.twice else step for step in steps]
            steps = [e.minus(step, offset) if offset else step for step in steps]
        if self.folds:
            pairs = [Avx2.factor(e, factor) for factor in factors]
            for number in range(self.n_steps if pairs else 0):
                steps[number] = e.builder.mul(steps[number], pairs[number * len(pairs) // self.n_steps])
            factors = []
        factors = [factor if self.planes == 2 else self.isa.factor(e, factor) for factor in factors]
        vectors = (*steps, *factors, *group.scales, *group.mins)
        assert BYTES * len(vectors) == self.group_bytes
        for index, part in enumerate(vectors):
            e.store(part, address, BYTES * index, align=BYTES)

    def widen(self, line: Value, target: Value) -> None:
        """Writes the activations of a line of 8 bits in the order of the weights."""
        for index, part in enumerate(widened(self._e, self._e.load(line, V8))):
            self._e.store(part, target, BYTES * index, align=BYTES)

    def weights(self, address: Value) -> Value:
        """Weights of the step at an address."""
        return self._e.load(address, V16 if self.pairs else V8, align=BYTES)

    def activations(self, address: Value) -> Value:
        """The activations of the step at an address, in all lanes."""
        four = broadcast(self._e, address, 0)
        return self._e.builder.bitcast(four, V16) if self.pairs else four

    def factor(self, address: Value) -> Value:
        """The factor at an address."""
        kind = V32 if self.planes == 2 else self.isa.factor(self._e, zeros(V32)).type
        return self._e.load(address, kind, align=BYTES)

    def scales(self, address: Value) -> list[Value]:
        """Scales of the group at an address."""
        return self._floats(address, self.n_steps + self.n_factors, self.n_scales)

    def mins(self, address: Value) -> tuple[Value, ...]:
        """Its minima."""
        return tuple(self._floats(address, self.n_steps + self.n_factors + self.n_scales, self.n_mins))

    def _floats(self, address: Value, first: int, count: int) -> list[Value]:
        return [self._e.load(address, FLOATS, BYTES * (first + i), BYTES) for i in range(count)]


class Counts:
    """Constants that LLVM does not know, so that it does not unroll the loops.

    Unrolled, the products would be reordered so that many weights are held at once, more than there are registers.
    """

    def __init__(self, e: Emitter) -> None:
        self._e = e
        self._room = e.room(8 * STEPS)
        for number in range(1, STEPS + 1):
            e.store(I64(number), self._room, 8 * (number - 1), align=8)

    def loop(self, count: int) -> Any:
        """A loop of `count` rounds."""
        return cgutils.for_range(self._e.builder, self._e.load(self._room, I64, 8 * (count - 1), align=8))


def multiply(
    e: Emitter,
    tile: Tile,
    tiles: list[Value],
    tokens: tuple[list[Value], list[Value]],
    cells: list[list[Value]],
    n_blocks: Value,
    counts: Counts,
) -> None:
    """Adds n_blocks blocks of the tiles times activations to the float sums at `cells`.

    Of each token there are lines of activations, and where the numbers to multiply are: there, or widened elsewhere.

    A tile at the edge repeats its last panel or token: both copies read the same sums and write the same ones, as the
    sums of all are read before any is written.
    """
    b, (lines, inputs) = e.builder, tokens
    pairs = [(p, t) for p in range(len(tiles)) for t in range(len(lines))]
    n_groups = tile.panel.n_groups
    by_blocks = tile.kind.block_scale and n_groups > 1
    for part, add in enumerate((_multiply_group, _minima_of_group)[: 2 if tile.n_mins else 1]):
        kept = {pair: cgutils.alloca_once(b, FLOATS) for pair in pairs}
        for p, t in pairs:
            b.store(e.load(cells[p][t], FLOATS, BYTES * part, BYTES), kept[p, t])

        def add_one(index: Value, sums: dict[tuple[int, int], Value], add: Any = add) -> None:
            """Adds group `index`."""
            starts = [b.add(start, scaled(b, index, tile.group_bytes)) for start in tiles]
            offset = scaled(b, index, tile.kind.line.n_bytes)
            places, numbers = ([b.add(line, offset) for line in part] for part in (lines, inputs))
            add(e, tile, starts, (places, numbers), sums, counts)

        if part == 0 and by_blocks:
            of_block = {pair: cgutils.alloca_once(b, FLOATS) for pair in pairs}
            with cgutils.for_range(b, n_blocks) as blocks:
                for at in of_block.values():
                    b.store(zeros(FLOATS), at)
                first = scaled(b, blocks.index, n_groups)
                with counts.loop(n_groups) as groups:
                    add_one(b.add(first, groups.index), of_block)
                scales = [tile.scales(b.add(start, scaled(b, first, tile.group_bytes)))[0] for start in tiles]
                for (p, t), at in kept.items():
                    b.store(e.multiply_add(b.load(of_block[p, t]), scales[p], b.load(at)), at)
        else:
            with cgutils.for_range(b, scaled(b, n_blocks, n_groups)) as groups:
                add_one(groups.index, kept)
        for p, t in pairs:
            e.store(b.load(kept[p, t]), cells[p][t], BYTES * part, BYTES)


def _multiply_group(
    e: Emitter,
    tile: Tile,
    starts: list[Value],
    tokens: tuple[list[Value], list[Value]],
    kept: dict[tuple[int, int], Value],
    counts: Counts,
) -> None:
    """Adds the products of one group."""
    b, (places, inputs) = e.builder, tokens
    arithmetic, span = tile.isa(e, tile.panel.largest), tile.span_steps
    unit = min(span, tile.isa.steps_at_once)
    ints = {pair: [cgutils.alloca_once(b, V32) for _ in range(tile.n_parts)] for pair in kept}
    sums = {pair: cgutils.alloca_once(b, tile.isa.accumulator) for pair in kept}
    for at in chain.from_iterable(ints.values()):
        b.store(zeros(V32), at)

    def factors_of(which: Value) -> list[Value | None]:
        """Factor `which` of each tile."""
        if not tile.n_factors:
            return [None] * len(starts)
        offset = b.add(scaled(b, which, BYTES), I64(BYTES * tile.n_steps))
        return [tile.factor(b.add(start, offset)) for start in starts]

    def add_span(first: Value, which: int, plane: int) -> None:
        """Steps from number `first` on, to the sums of part `which`."""
        for at in sums.values():
            b.store(zeros(tile.isa.accumulator), at)

        def add_unit(begin: Value) -> None:
            for step in range(unit):
                if unit > 2:
                    hold(e)
                number = b.add(begin, I64(step))
                weights = [tile.weights(b.add(start, scaled(b, number, BYTES))) for start in starts]
                for t, place in enumerate(inputs):
                    four = tile.activations(b.add(place, b.add(scaled(b, number, 4), I64(GROUP * plane))))
                    for p, these in enumerate(weights):
                        b.store(arithmetic.add(b.load(sums[p, t]), these, four), sums[p, t])

        if span == unit:
            add_unit(first)
        else:
            with counts.loop(span // unit) as units:
                add_unit(b.add(first, scaled(b, units.index, unit)))
        # Each factor belongs to as many steps as the others.
        late = tile.n_factors and tile.planes == 1
        factors = factors_of(b.sdiv(first, I64(tile.n_steps // tile.n_factors))) if late else [None] * len(starts)
        for (p, t), at in sums.items():
            part = arithmetic.finish(b.load(at), factors[p])
            total = ints[p, t][which]
            b.store(b.add(b.load(total), part), total)

    steps = tile.n_steps // tile.n_parts
    for plane in range(tile.planes):
        for at in chain.from_iterable(ints.values()) if plane else ():
            b.store(e.shift_left(b.load(at), 8), at)
        for which in range(tile.n_parts):
            if span == steps:
                add_span(I64(which * steps), which, plane)
            elif 2 * span == steps:
                for first in (0, span):
                    add_span(I64(which * steps + first), which, plane)
            else:
                with counts.loop(steps // span) as spans:
                    add_span(b.add(I64(which * steps), scaled(b, spans.index, span)), which, plane)
    totals = {pair: [b.load(at) for at in parts] for pair, parts in ints.items()}
    if tile.planes == 2 and tile.n_factors:
        for which in range(tile.n_parts):
            factors = factors_of(I64(which * tile.n_factors // tile.n_parts))
            for (p, _), parts in totals.items():
                parts[which] = b.mul(parts[which], factors[p])
    if tile.n_sums < tile.n_parts:
        totals = {pair: [b.add(*parts)] for pair, parts in totals.items()}
    scales = [tile.scales(start) for start in starts]
    empty = tile.kind.block_scale and tile.panel.n_groups == 1
    for (p, t), at in kept.items():
        factor, total = float_at(e, places[t], tile.kind.line.scale), b.load(at)
        added = add_group(e, tile.kind, totals[p, t], scales[p], factor, None if empty else total)
        b.store(e.multiply_add(added, scales[p][0], total) if empty else added, at)


def _minima_of_group(
    e: Emitter,
    tile: Tile,
    starts: list[Value],
    tokens: tuple[list[Value], list[Value]],
    kept: dict[tuple[int, int], Value],
    counts: Counts,
) -> None:
    """Adds the minima of one group."""
    mins = [tile.mins(start) for start in starts]
    for (p, t), at in kept.items():
        e.builder.store(add_minima(e, tile.kind, mins[p], tokens[0][t], e.builder.load(at)), at)
