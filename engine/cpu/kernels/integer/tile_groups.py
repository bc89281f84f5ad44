"""Unpacked groups of panels in memory, and their products with the activations of some tokens (for tiles.py)."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from engine.cpu.kernels.emit import F32, I8, I16, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.integer.activations import SHIFT, scaled
from engine.cpu.kernels.integer.groups import (
    Kind,
    add_group,
    add_minima,
    as_floats,
    broadcast,
    float_at,
    hold,
    widened,
    zeros,
)
from engine.cpu.kernels.integer.matrices import TOKENS, Matrices
from engine.cpu.kernels.integer.panels import FLOATS, GROUP, STEPS, Group
from engine.cpu.kernels.integer.tile_steps import step_sums
from engine.cpu.kernels.isa import BYTES, ROWS, V8, V16, V32, Avx2
from engine.cpu.kernels.processor import is_amd

GROUPS_CHUNK = 8
"""Groups unpacked together."""

TOKENS_TILE = 4
"""Tokens of a register tile."""

VECTORS_TILE = 2
"""Vectors of rows in a register tile: 2 x 4 sums fill 8 of AVX2's 16 registers."""

VECTORS_TILE_32 = 4
"""The same with 32 registers: on a core of Zen 4 94 instead of 88 GMAC/s (vectors of 32 bytes, Q4_0, 16 bits), of
Emerald Rapids 259 instead of 226 (64 bytes, Q4_0), but 184 instead of 196 where bytes have sums of two parts (Q6_K).
Not for vectors of 64 bytes on AMD's processors: on Zen 4 148 instead of 155 (Q4_K), 95 instead of 99 (F16)."""


class Tile:
    """Unpacked groups in memory: vectors of weights, factors, scales and minima, 32 bytes for each panel side by side.

    Where activations are biased, what sums begin with is behind them, and -SHIFT times the factors.

    Attributes:
        shifted: sums begin with the bits of SHIFT in addition, so that they are SHIFT more when they are read as
            floats. To multiply such a number and to take SHIFT times the factor away is one instruction, and exact.
        folds: weights are multiplied by the factors of their columns when they are unpacked, and negated.
        side: panels that share vectors. Their groups are interleaved, so that a vector is one load.
        ordered: steps are in an order of their own (tile_steps.py), and float sums in memory, as registers are few.
        vectors: of a register tile, where there are 32 registers.
        items: unpacked together.
    """

    def __init__(self, e: Emitter, kind: Kind) -> None:
        self._e, self.kind, self.panel, self.isa = e, kind, kind.panel, kind.arithmetic(tiles=True)
        self.pairs = self.isa.columns == 2
        self.widens = self.pairs and kind.bits == 8
        matrices = self.isa.multiplies_tokens
        self.n_steps = GROUP // self.isa.columns
        self.planes = 2 if kind.bits == 16 and not self.pairs else 1
        # What the weights take with them: offsets where they may be signed, factors too as numbers of 16 bits.
        offset = self.panel.offset(self.isa)
        self.taken, self.offset = (offset, 0) if self.isa.multiplies_signed else (0, offset)
        self.n_scales, self.n_mins = self.panel.n_scales, self.panel.n_mins
        self.folds = not self.pairs and self.isa.multiplies_signed and self.panel.fits_bytes
        self.n_factors = 0 if self.pairs or self.folds else self.panel.n_factors
        self.n_parts = max(kind.n_sums, self.n_factors)
        self.span_steps = self.isa.span(self.n_steps // self.n_parts, self.panel.largest, self.offset)
        self.ordered = self.isa.mnemonics is not None
        self.side = self.isa.side
        self.vector_bytes, self.lanes = BYTES * self.side, ROWS * self.side
        self.floats = vector(F32, self.lanes)
        self.n_tokens = TOKENS if matrices else TOKENS_TILE
        self.biased = self.isa.biased
        self.n_starts = self.n_parts if self.biased else 0
        # Integers below 2 ** 24 are floats, too: the same sums, and a multiplication of floats is faster.
        exact = self.panel.largest_sum(kind.line.largest) < 1 << 24
        self.float_factors = (matrices or self.biased) and self.n_factors > 0 and exact
        self.shifted = self.biased and (self.float_factors or not self.n_factors)
        self.n_shifts = self.n_factors if self.shifted else 0
        large = not self.ordered and (self.side == 1 or self.n_parts == 1 or self.pairs)
        wide = VECTORS_TILE if self.side > 1 and is_amd() else VECTORS_TILE_32
        self.vectors = 1 if matrices else wide if large else VECTORS_TILE
        # What a register tile takes. For AMX more, as tokens are copied anew for each: on a core of Emerald Rapids 212
        # GMAC/s with 8, 202 with 4, 196 with 2 (Q4_0; 186 without AMX), 169, 167, 153 (Q4_K; 137).
        self.items = 8 if matrices else 2 if large and self.side > 1 else 1
        # Lines of activations of a tile of tokens are copied: widened, or to be side by side.
        self.copies = self.widens or matrices
        self.copied_bytes = kind.line.n_bytes * GROUPS_CHUNK
        counts = self.n_steps, self.n_factors, self.n_scales, self.n_mins, self.n_starts, self.n_shifts
        self._places = [sum(counts[:number]) for number in range(len(counts))]
        self.group_bytes = self.vector_bytes * sum(counts)
        self.matrices = Matrices(e, self.n_parts, self.copied_bytes) if matrices else None

    def write(self, address: Value, group: Group) -> None:
        """Puts a group of one panel there."""
        e, steps, factors, scales = self._e, list(group.steps), list(group.factors), group.scales
        if self.pairs and not self.panel.wide:
            both = [widened(e, step) for step in steps]
            # The order of activations: all even and all odd places, or even and odd ones of each step.
            steps = list(chain.from_iterable(zip(*both, strict=True) if self.widens else both))
        steps = [e.minus(step, self.taken) if self.taken else step for step in steps]
        if self.folds:
            negative = [Avx2.factor(e, e.builder.neg(factor)) for factor in factors]
            size = self.n_steps // len(negative)
            steps = [_times(e, step, negative[number // size]) for number, step in enumerate(steps)]
            factors, scales = [], tuple(e.builder.fneg(scale) for scale in scales)
        if self.isa.pairs_tokens:
            steps = list(chain.from_iterable(_zipped(e, *both) for both in zip(steps[::2], steps[1::2], strict=True)))
        if self.pairs:
            pairs = [Avx2.factor(e, factor) for factor in factors]
            for number in range(self.n_steps if pairs else 0):
                steps[number] = e.builder.mul(steps[number], pairs[number * len(pairs) // self.n_steps])
            factors = []
        if self.float_factors:
            factors = [as_floats(e, factor) for factor in factors]
        factors = [self.isa.factor(e, factor) for factor in factors]
        shifts = [e.multiply(factor, e.const(factor, -SHIFT)) for factor in factors[: self.n_shifts]]
        vectors = (*steps, *factors, *scales, *group.mins, *self._starts(steps), *shifts)
        assert self.vector_bytes * len(vectors) == self.group_bytes
        for index, part in enumerate(vectors):
            e.store(part, address, self.vector_bytes * index, align=BYTES)

    def _starts(self, steps: list[Value]) -> list[Value]:
        """What the sums of each part begin with."""
        e, size = self._e, len(steps) // self.n_parts
        starts = []
        for part in range(self.n_starts):
            total = zeros(V32)
            for step in steps[part * size : (part + 1) * size]:
                total = self.isa.bias(e, total, step)
            begin = e.builder.bitcast(e.const(zeros(FLOATS), SHIFT), V32) if self.shifted else zeros(V32)
            starts.append(e.builder.sub(begin, total))
        return starts

    def starts(self, address: Value, part: int) -> Value:
        """What the sums of a part of the group at an address begin with."""
        place = self.vector_bytes * (self._places[4] + part)
        return self._e.load(address, self.isa.accumulator, place, self.vector_bytes)

    def shifts(self, address: Value) -> list[Value]:
        """-SHIFT times the factors of the group at an address."""
        return self._floats(address, self._places[5], self.n_shifts)

    def copy(self, line: Value, target: Value) -> None:
        """Writes a line of activations of 8 bits; or these as 16 bits, in the order of the weights."""
        if not self.widens:
            whole = vector(I8, self.kind.line.n_bytes)
            self._e.store(self._e.load(line, whole), target, align=whole.count)
            return
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

    def activations_of_two(self, addresses: list[Value]) -> Value:
        """The activations of two steps at each of two addresses, 16 bytes."""
        return self._e.join([self._e.load(address, I64) for address in addresses], vector(I8, 16))

    def count(self, line: Value, part: int) -> Value:
        """The sum of the activations of a part of a group, in all lanes."""
        place = self.kind.line.places(self.kind.line.counts, self.n_parts)[part]
        return self._e.splat(self._e.load(line, I32, place, align=4), self.lanes)

    def factors(self, starts: list[Value], part: int) -> list[Value | None]:
        """The factor of a part of each of the groups at addresses."""
        if not self.n_factors:
            return [None] * len(starts)
        kind = self.isa.factor(self._e, zeros(vector(I32, self.lanes))).type
        kind = self.floats if self.float_factors else kind
        place = self.vector_bytes * (self._places[1] + part * self.n_factors // self.n_parts)
        return [self._e.load(start, kind, place, self.vector_bytes) for start in starts]

    def scales(self, address: Value) -> list[Value]:
        """Scales of the group at an address."""
        return self._floats(address, self._places[2], self.n_scales)

    def mins(self, address: Value) -> tuple[Value, ...]:
        """Its minima."""
        return tuple(self._floats(address, self._places[3], self.n_mins))

    def _floats(self, address: Value, first: int, count: int) -> list[Value]:
        size = self.vector_bytes
        return [self._e.load(address, self.floats, size * (first + i), size) for i in range(count)]


def _times(e: Emitter, step: Value, factor: Value) -> Value:
    """Bytes times numbers of 16 bits, which the two in each place share; products are bytes, too."""
    even, odd = (e.builder.mul(part, factor) for part in widened(e, step))
    return e.builder.bitcast(e.either(e.mask(even, 0xFF), e.shift_left(odd, 8)), V8)


def _zipped(e: Emitter, a: Value, c: Value) -> list[Value]:
    """Words of two vectors by turns, in two vectors."""
    return [_words(e, a, c, [lane + part for lane in range(first, first + 4) for part in (0, 8)]) for first in (0, 4)]


def _unzipped(e: Emitter, a: Value, c: Value) -> list[Value]:
    """Words at even, and at odd places of two vectors."""
    return [_words(e, a, c, range(first, 2 * ROWS, 2)) for first in (0, 1)]


def _words(e: Emitter, a: Value, c: Value, lanes: Iterable[int]) -> Value:
    words = (e.builder.bitcast(part, V32) for part in (a, c))
    return e.builder.bitcast(e.builder.shuffle_vector(*words, ir.Constant(V32, list(lanes))), a.type)


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
    # One after the other: there are no registers for both.
    for add in adds:
        of_cells = {
            pair: e.pointer(e.at(cells, tile.vector_bytes * (len(adds) * number + adds.index(add))), tile.floats)
            for number, pair in enumerate(pairs)
        }
        in_memory = tile.ordered and add is _multiply_group
        kept = of_cells
        if not in_memory:
            kept = {pair: cgutils.alloca_once_value(b, b.load(at)) for pair, at in of_cells.items()}

        def add_one(index: Value, sums: dict[tuple[int, int], Value], add: Any = add) -> None:
            """Adds group `index`."""
            starts = [b.add(start, scaled(b, index, tile.group_bytes)) for start in tiles]
            offset = scaled(b, index, tile.kind.line.n_bytes)
            groups, numbers = ([b.add(line, offset) for line in part] for part in (lines, inputs))
            add(e, tile, starts, (groups, numbers), sums, counts)

        if by_blocks and add is _multiply_group:
            of_block = {pair: cgutils.alloca_once(b, tile.floats) for pair in pairs}
            if in_memory:
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
                    add_one(b.add(first, groups.index), of_block)
                scales = [tile.scales(b.add(start, scaled(b, first, tile.group_bytes)))[0] for start in tiles]
                for (p, t), at in kept.items():
                    b.store(e.multiply_add(b.load(of_block[p, t]), scales[p], b.load(at)), at)
        else:
            with cgutils.for_range(b, scaled(b, n_blocks, n_groups)) as groups:
                add_one(groups.index, kept)
        if not in_memory:
            for pair, at in of_cells.items():
                b.store(b.load(kept[pair]), at)


def _multiply_group(
    e: Emitter,
    tile: Tile,
    starts: list[Value],
    tokens: tuple[list[Value], list[Value]],
    kept: dict[tuple[int, int], Value],
    counts: Counts,
) -> None:
    """Adds the products of one group."""
    scales = [tile.scales(start) for start in starts]
    if tile.matrices is None:
        totals = _sums_of_group(e, tile, starts, tokens, kept, counts)
        by = [tile.factors(starts, part) for part in range(tile.n_parts)] if tile.float_factors else []
        less = [tile.shifts(start) for start in starts]
        for (p, t), at in kept.items():
            sums = totals[p, t]
            if tile.float_factors:
                sums = _with_factors(e, tile, sums, [factors[p] for factors in by], less[p])
            _add_products(e, tile, sums, scales[p], tokens[0][t], at)
        return
    tile.matrices.multiply(starts[0], tokens[1][0])
    factors = [tile.factors(starts, part)[0] for part in range(tile.n_parts)]
    for (_, t), at in kept.items():
        hold(e)
        sums = [tile.matrices.sums(part, t) for part in range(tile.n_parts)]
        _add_products(e, tile, _with_factors(e, tile, sums, factors, []), scales[0], tokens[0][t], at)


def _add_products(e: Emitter, tile: Tile, sums: list[Value], scales: list[Value], line: Value, at: Value) -> None:
    """Adds the sums of a group, factors included, to the float sum kept at `at`."""
    empty = tile.kind.block_scale and tile.panel.n_groups == 1
    factor, total = float_at(e, line, tile.kind.line.scale, tile.lanes), e.builder.load(at)
    if tile.shifted and not tile.n_factors:
        shifted = [e.builder.bitcast(part, tile.floats) for part in sums]
        if empty and len(shifted) == 1:
            less = float_at(e, line, tile.kind.line.shifted, tile.lanes)
            added = e.multiply_add(shifted[0], factor, less)
            e.builder.store(e.multiply_add(added, scales[0], total), at)
            return
        sums = [e.builder.fsub(part, e.const(part, SHIFT)) for part in shifted]
    added = add_group(e, tile.kind, sums, scales, factor, None if empty else total)
    e.builder.store(e.multiply_add(added, scales[0], total) if empty else added, at)


def _with_factors(
    e: Emitter, tile: Tile, sums: list[Value], factors: list[Value | None], shifts: list[Value]
) -> list[Value]:
    """Sums of the parts of a group times their factors, as integers or as the floats that equal them."""
    together = tile.kind.n_sums < tile.n_parts
    if tile.shifted:
        floats = [e.builder.bitcast(part, tile.floats) for part in sums]
        by = [shifts[part * tile.n_shifts // tile.n_parts] for part in range(tile.n_parts)]
        products = [e.multiply_add(part, factor, less) for part, factor, less in zip(floats, factors, by, strict=True)]
        return [e.builder.fadd(*products)] if together else products
    if not tile.float_factors:
        sums = [part if by is None else e.builder.mul(part, by) for part, by in zip(sums, factors, strict=True)]
        return [e.builder.add(*sums)] if together else sums
    floats = [as_floats(e, part) for part in sums]
    products = [e.multiply(part, by) for part, by in zip(floats, factors, strict=True)]
    return [e.multiply_add(floats[1], factors[1], products[0])] if together else products


def _sums_of_group(
    e: Emitter,
    tile: Tile,
    starts: list[Value],
    tokens: tuple[list[Value], list[Value]],
    kept: dict[tuple[int, int], Value],
    counts: Counts,
) -> dict[tuple[int, int], list[Value]]:
    """Sums of one group."""
    b, (places, inputs) = e.builder, tokens
    arithmetic, span = tile.isa(e, tile.panel.largest), tile.span_steps
    unit = min(span, tile.isa.steps_at_once)
    sums = {pair: cgutils.alloca_once(b, tile.isa.accumulator) for pair in kept}

    def add_to_pairs(number: Value, half: int) -> None:
        """Adds half of the rows of two steps, of which step `number` is one, for two tokens at once."""
        weights = [tile.weights(b.add(start, scaled(b, number, tile.vector_bytes))) for start in starts]
        offset = scaled(b, b.sub(number, I64(half)), 4)
        for t in range(0, len(inputs), 2):
            two = tile.activations_of_two([b.add(place, offset) for place in inputs[t : t + 2]])
            for p, these in enumerate(weights):
                b.store(arithmetic.add(b.load(sums[p, t + half]), these, two), sums[p, t + half])

    def add_steps(first: Value, plane: int) -> None:
        """Adds a span of steps from number `first` on to `sums`."""

        def add_unit(begin: Value) -> None:
            for step in range(unit):
                if unit > 2:
                    hold(e)
                number = b.add(begin, I64(step))
                if tile.isa.pairs_tokens:
                    add_to_pairs(number, step % 2)
                    continue
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
            given = [tile.isa.factor(e, e.const(zeros(V32), 1)) if factor is None else factor for factor in factors]
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
        if tile.float_factors:
            factors = [None] * len(starts)
        whole = span == steps
        begun = [arithmetic.begin(number, tile.offset, halves=tile.kind.line.halves, whole=whole) for number in numbers]
        given = [tile.starts(start, part) for start in starts] if tile.biased else None
        taken = {(p, t): arithmetic.taken(numbers[t], tile.offset, factors[p], whole=whole) for p, t in kept}
        if tile.ordered:
            return ordered(range(part * steps, (part + 1) * steps), factors, begun if tile.offset else [], taken)
        if whole:
            for plane in range(tile.planes):
                for (p, t), at in sums.items():
                    begin = begun[t] if given is None else given[p]
                    b.store(e.shift_left(b.load(at), 8) if plane else begin, at)
                add_steps(I64(part * steps), plane)
            lanes = {pair: b.load(at) for pair, at in sums.items()}
            if tile.isa.pairs_tokens:
                for p, t in [(p, t) for p, t in sums if t % 2 == 0]:
                    lanes[p, t], lanes[p, t + 1] = _unzipped(e, lanes[p, t], lanes[p, t + 1])
            totals = {pair: arithmetic.finish(total, factors[pair[0]]) for pair, total in lanes.items()}
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
    if tile.kind.n_sums < tile.n_parts and not tile.float_factors:
        totals = {pair: [b.add(*both)] for pair, both in totals.items()}
    return totals


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
