"""Unpacked groups of panels in memory, and their products with the activations of some tokens (for tiles.py)."""

from itertools import chain
from typing import Any

from numba.core import cgutils

from engine.cpu.kernels.emit import F32, I8, I16, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.integer.activations import scaled
from engine.cpu.kernels.integer.groups import (
    Kind,
    add_group,
    add_minima,
    broadcast,
    float_at,
    hold,
    widened,
    zeros,
)
from engine.cpu.kernels.integer.panels import GROUP, STEPS, Group
from engine.cpu.kernels.integer.tile_steps import step_sums
from engine.cpu.kernels.isa import BYTES, ROWS, V8, V16, V32, Avx2


class Tile:
    """Unpacked groups in memory: vectors of weights, factors, scales and minima, 32 bytes for each panel side by side.

    Attributes:
        side: panels that share vectors. Their groups are interleaved, so that a vector is one load.
        ordered: steps are in an order of their own (tile_steps.py), and float sums in memory, as registers are few.
    """

    def __init__(self, e: Emitter, kind: Kind) -> None:
        self._e, self.kind, self.panel, self.isa = e, kind, kind.panel, kind.arithmetic(tiles=True)
        self.pairs = self.isa.columns == 2
        self.widens = self.pairs and kind.bits == 8
        self.n_steps = GROUP // self.isa.columns
        self.planes = 2 if kind.bits == 16 and not self.pairs else 1
        # What the weights take with them: offsets where they may be signed, factors too as numbers of 16 bits.
        offset = self.panel.offset(self.isa)
        self.taken, self.offset = (offset, 0) if self.isa.multiplies_signed else (0, offset)
        self.n_scales, self.n_mins = self.panel.n_scales, self.panel.n_mins
        self.n_factors = 0 if self.pairs else self.panel.n_factors
        self.n_parts = max(kind.n_sums, self.n_factors)
        self.span_steps = self.isa.span(self.n_steps // self.n_parts, self.panel.largest, self.offset)
        self.ordered = self.isa.mnemonics is not None
        self.side = self.isa.side
        self.vector_bytes, self.lanes = BYTES * self.side, ROWS * self.side
        self.floats = vector(F32, self.lanes)
        self.group_bytes = self.vector_bytes * (self.n_steps + self.n_factors + self.n_scales + self.n_mins)

    def write(self, address: Value, group: Group) -> None:
        """Puts a group of one panel there."""
        e, steps, factors = self._e, list(group.steps), list(group.factors)
        if self.pairs and not self.panel.wide:
            both = [widened(e, step) for step in steps]
            # The order of activations: all even and all odd places, or even and odd ones of each step.
            steps = list(chain.from_iterable(zip(*both, strict=True) if self.widens else both))
        steps = [e.minus(step, self.taken) if self.taken else step for step in steps]
        if self.pairs:
            pairs = [Avx2.factor(e, factor) for factor in factors]
            for number in range(self.n_steps if pairs else 0):
                steps[number] = e.builder.mul(steps[number], pairs[number * len(pairs) // self.n_steps])
            factors = []
        factors = [self.isa.factor(e, factor) for factor in factors]
        vectors = (*steps, *factors, *group.scales, *group.mins)
        assert self.vector_bytes * len(vectors) == self.group_bytes
        for index, part in enumerate(vectors):
            e.store(part, address, self.vector_bytes * index, align=BYTES)

    def widen(self, line: Value, target: Value) -> None:
        """Writes the activations of a line of 8 bits in the order of the weights."""
        for index, part in enumerate(widened(self._e, self._e.load(line, V8))):
            self._e.store(part, target, BYTES * index, align=BYTES)

    def weights(self, address: Value) -> Value:
        """Weights of the step at an address."""
        kind = vector(I16, 2 * self.lanes) if self.pairs else vector(I8, 4 * self.lanes)
        return self._e.load(address, kind, align=self.vector_bytes)

    def activations(self, address: Value) -> Value:
        """The activations of the step at an address, in all lanes."""
        four = broadcast(self._e, address, 0, self.lanes)
        return self._e.builder.bitcast(four, vector(I16, 2 * self.lanes)) if self.pairs else four

    def count(self, line: Value, part: int) -> Value:
        """The sum of the activations of a part of a group, in all lanes."""
        place = self.kind.line.places(self.kind.line.counts, self.n_parts)[part]
        return self._e.splat(self._e.load(line, I32, place, align=4), self.lanes)

    def factors(self, starts: list[Value], part: int) -> list[Value | None]:
        """The factor of a part of each of the groups at addresses."""
        if not self.n_factors:
            return [None] * len(starts)
        kind = self.isa.factor(self._e, zeros(vector(I32, self.lanes))).type
        place = self.vector_bytes * (self.n_steps + part * self.n_factors // self.n_parts)
        return [self._e.load(start, kind, place, self.vector_bytes) for start in starts]

    def scales(self, address: Value) -> list[Value]:
        """Scales of the group at an address."""
        return self._floats(address, self.n_steps + self.n_factors, self.n_scales)

    def mins(self, address: Value) -> tuple[Value, ...]:
        """Its minima."""
        return tuple(self._floats(address, self.n_steps + self.n_factors + self.n_scales, self.n_mins))

    def _floats(self, address: Value, first: int, count: int) -> list[Value]:
        size = self.vector_bytes
        return [self._e.load(address, self.floats, size * (first + i), size) for i in range(count)]


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
    cells: Value,
    n_blocks: Value,
    counts: Counts,
) -> None:
    """Adds n_blocks blocks of the tiles times activations to the float sums at `cells`, [panel][token][which].

    Of each token there are lines of activations, and where the numbers to multiply are: there, or widened elsewhere.

    A tile at the edge repeats its last panel or token, with cells of its own for it.
    """
    b, (lines, inputs) = e.builder, tokens
    pairs = [(p, t) for p in range(len(tiles)) for t in range(len(lines))]
    n_groups = tile.panel.n_groups
    by_blocks = tile.kind.block_scale and n_groups > 1
    adds = (_multiply_group, _minima_of_group)[: 2 if tile.n_mins else 1]
    # In one pass where there are registers for it.
    for passed in (adds,) if tile.side > 1 else ((add,) for add in adds):
        kept, copied = {}, {}
        for add in passed:
            of_cells = {
                pair: e.pointer(e.at(cells, tile.vector_bytes * (len(adds) * number + adds.index(add))), tile.floats)
                for number, pair in enumerate(pairs)
            }
            kept[add] = of_cells
            if add is _minima_of_group or not tile.ordered:
                copied[add] = of_cells
                kept[add] = {pair: cgutils.alloca_once_value(b, b.load(at)) for pair, at in of_cells.items()}

        def add_one(index: Value, sums_of: dict[Any, dict[tuple[int, int], Value]]) -> None:
            """Adds group `index`."""
            starts = [b.add(start, scaled(b, index, tile.group_bytes)) for start in tiles]
            offset = scaled(b, index, tile.kind.line.n_bytes)
            groups, numbers = ([b.add(line, offset) for line in part] for part in (lines, inputs))
            for add, sums in sums_of.items():
                add(e, tile, starts, (groups, numbers), sums, counts)

        if by_blocks and _multiply_group in passed:
            of_block = {pair: cgutils.alloca_once(b, tile.floats) for pair in pairs}
            if tile.ordered:
                room = e.room(tile.vector_bytes * len(pairs))
                of_block = {
                    pair: e.pointer(e.at(room, tile.vector_bytes * number), tile.floats)
                    for number, pair in enumerate(pairs)
                }
            with cgutils.for_range(b, n_blocks) as blocks:
                for at in of_block.values():
                    b.store(zeros(tile.floats), at)
                first = scaled(b, blocks.index, n_groups)
                with counts.loop(n_groups) as groups:
                    add_one(b.add(first, groups.index), kept | {_multiply_group: of_block})
                scales = [tile.scales(b.add(start, scaled(b, first, tile.group_bytes)))[0] for start in tiles]
                for (p, t), at in kept[_multiply_group].items():
                    b.store(e.multiply_add(b.load(of_block[p, t]), scales[p], b.load(at)), at)
        else:
            with cgutils.for_range(b, scaled(b, n_blocks, n_groups)) as groups:
                add_one(groups.index, kept)
        for add, of_cells in copied.items():
            for pair, at in of_cells.items():
                b.store(b.load(kept[add][pair]), at)


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
    sums = {pair: cgutils.alloca_once(b, tile.isa.accumulator) for pair in kept}

    def add_steps(first: Value, plane: int) -> None:
        """Adds a span of steps from number `first` on to `sums`."""

        def add_unit(begin: Value) -> None:
            for step in range(unit):
                if unit > 2:
                    hold(e)
                number = b.add(begin, I64(step))
                weights = [tile.weights(b.add(start, scaled(b, number, tile.vector_bytes))) for start in starts]
                for t, place in enumerate(inputs):
                    four = tile.activations(b.add(place, b.add(scaled(b, number, 4), I64(GROUP * plane))))
                    for p, these in enumerate(weights):
                        b.store(arithmetic.add(b.load(sums[p, t]), these, four), sums[p, t])

        if span == unit:
            add_unit(first)
        else:
            with counts.loop(span // unit) as units:
                add_unit(b.add(first, scaled(b, units.index, unit)))

    def ordered(
        steps: range, factors: list[Value | None], begun: list[Value], totals: dict[tuple[int, int], Value | None]
    ) -> dict[tuple[int, int], Value]:
        """Sums of the steps of a part, added to `totals`."""
        by_step = tile.isa.accumulator is V16 and span == 1
        if by_step:
            given = [arithmetic.ones() if factor is None else factor for factor in factors]
            made = [step_sums(e, tile.isa, (starts, inputs), steps, factors=given)]
        else:
            spans = [steps[first : first + span] for first in range(0, len(steps), span)]
            begun = begun if len(spans) == 1 else []
            made = [step_sums(e, tile.isa, (starts, inputs), part, starts=begun) for part in spans]
        for sums in made:
            for p, t in kept:
                total = sums[p][t] if by_step else arithmetic.finish(sums[p][t], factors[p])
                before = totals[p, t]
                totals[p, t] = total if before is None else b.add(before, total)
        return totals

    def add_part(part: int) -> dict[tuple[int, int], Value]:
        """Sums of the steps that share a factor, and what it makes of them."""
        numbers = [tile.count(place, part) if tile.offset else None for place in places]
        factors, steps = tile.factors(starts, part), tile.n_steps // tile.n_parts
        whole = span == steps
        begun = [arithmetic.begin(number, tile.offset, halves=tile.kind.line.halves, whole=whole) for number in numbers]
        taken = {(p, t): arithmetic.taken(numbers[t], tile.offset, factors[p], whole=whole) for p, t in kept}
        if tile.ordered:
            return ordered(range(part * steps, (part + 1) * steps), factors, begun if tile.offset else [], taken)
        if whole:
            for plane in range(tile.planes):
                for (_, t), at in sums.items():
                    b.store(e.shift_left(b.load(at), 8) if plane else begun[t], at)
                add_steps(I64(part * steps), plane)
            totals = {pair: arithmetic.finish(b.load(at), factors[pair[0]]) for pair, at in sums.items()}
            return {pair: total if taken[pair] is None else b.add(total, taken[pair]) for pair, total in totals.items()}
        added = {pair: cgutils.alloca_once(b, V32) for pair in kept}
        for pair, at in added.items():
            b.store(zeros(V32) if taken[pair] is None else taken[pair], at)

        def add_span(first: Value) -> None:
            for at in sums.values():
                b.store(zeros(tile.isa.accumulator), at)
            add_steps(first, 0)
            for pair, at in added.items():
                b.store(b.add(b.load(at), arithmetic.finish(b.load(sums[pair]), factors[pair[0]])), at)

        if 2 * span == steps:
            for first in (0, span):
                add_span(I64(part * steps + first))
        else:
            with counts.loop(steps // span) as spans:
                add_span(b.add(I64(part * steps), scaled(b, spans.index, span)))
        return {pair: b.load(at) for pair, at in added.items()}

    parts = [add_part(part) for part in range(tile.n_parts)]
    totals = {pair: [part[pair] for part in parts] for pair in kept}
    if tile.kind.n_sums < tile.n_parts:
        totals = {pair: [b.add(*both)] for pair, both in totals.items()}
    scales = [tile.scales(start) for start in starts]
    empty = tile.kind.block_scale and tile.panel.n_groups == 1
    for (p, t), at in kept.items():
        factor, total = float_at(e, places[t], tile.kind.line.scale, tile.lanes), b.load(at)
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
