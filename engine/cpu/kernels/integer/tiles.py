"""Products of packed weights with many rows of activations: panels are unpacked once, then multiplied in tiles.

The sums are those of rows.py, in the same order, so the results have the same bits.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import I64, Emitter, Value
from engine.cpu.kernels.integer.activations import LINE, scaled
from engine.cpu.kernels.integer.panels import FLOATS, GROUP, STEPS, Block, Group, Panel
from engine.cpu.kernels.integer.rows import (
    Operands,
    Source,
    add_minima,
    add_products,
    broadcast,
    hold,
    panel_range,
    smaller,
    span_steps,
    split_name,
    store_sums,
    zeros,
)
from engine.cpu.kernels.isa import ACTIVATION_MAX, BYTES, ROWS, V8, V16, V32, Isa
from engine.cpu.kernels.stepping import STEP, emitter, integers

PANELS_TILE, TOKENS_TILE = 2, 4
"""Register tile: 2 x 4 sums fill 8 of AVX2's 16 registers."""

PANELS_BLOCK = 4
"""Panels unpacked together: quants of 256 columns take 8 KB."""

TOKENS_BLOCK = 64
"""Tokens between two unpackings: their float sums take 16 KB, and unpacking costs a few percent of their products."""

GROUPS_CHUNK = 8
"""Groups unpacked together."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"tile_panels": STEP}
"""Argument types of the kernel."""


class _Tile:
    """Unpacked groups in memory: vectors of weights, factors, scales and minima, 32 bytes each."""

    def __init__(self, e: Emitter, panel: Panel, isa: type[Isa]) -> None:
        self._e, self.panel, self.isa = e, panel, isa.for_tiles(panel.largest)
        self.wide = self.isa.columns == 2
        self.n_steps = GROUP // self.isa.columns
        self.n_scales, self.n_factors = panel.n_scales, panel.n_factors
        self.n_mins = panel.n_mins if isa.takes_signed or panel.largest <= ACTIVATION_MAX else 1
        self.group_bytes = BYTES * (self.n_steps + self.n_factors + self.n_scales + self.n_mins)

    def write(self, address: Value, group: Group) -> None:
        """Puts a group there."""
        factors = (self.isa.factor(self._e, factor) for factor in group.factors)
        steps = [part for parts in zip(*map(self._widened, group.steps), strict=True) for part in parts]
        vectors = (*steps, *factors, *group.scales, *group.mins)
        assert BYTES * len(vectors) == self.group_bytes
        for index, part in enumerate(vectors):
            self._e.store(part, address, BYTES * index, align=BYTES)

    def _widened(self, step: Value) -> tuple[Value, ...]:
        """The bytes of a step, or as 16 bits first those in even, then those in odd places."""
        b = self._e.builder
        if not self.wide:
            return (step,)
        both = b.bitcast(step, V16)
        eight = ir.Constant(V16, [8] * V16.count)
        return b.ashr(b.shl(both, eight), eight), b.ashr(both, eight)

    def widen(self, line: Value, target: Value) -> None:
        """Writes the activations of a line in the order of the weights."""
        parts = self._widened(self._e.load(line, V8))
        for index, part in enumerate(parts):
            self._e.store(part, target, BYTES * index, align=BYTES)

    def weights(self, address: Value) -> Value:
        """Weights of the step at an address."""
        return self._e.load(address, V16 if self.wide else V8, align=BYTES)

    def activations(self, address: Value) -> Value:
        """The activations of the step at an address, in all lanes."""
        four = broadcast(self._e, address, 0)
        return self._e.builder.bitcast(four, V16) if self.wide else four

    def factor(self, address: Value) -> Value:
        """The factor at an address."""
        return self._e.load(address, self.isa.factor(self._e, zeros(V32)).type, align=BYTES)

    def scales(self, address: Value) -> list[Value]:
        """Scales of the group at an address."""
        return self._floats(address, self.n_steps + self.n_factors, self.n_scales)

    def mins(self, address: Value) -> tuple[Value, ...]:
        """Its minima."""
        return tuple(self._floats(address, self.n_steps + self.n_factors + self.n_scales, self.n_mins))

    def _floats(self, address: Value, first: int, count: int) -> list[Value]:
        return [self._e.load(address, FLOATS, BYTES * (first + i), BYTES) for i in range(count)]


@intrinsic(prefer_literal=True)
def tile_panels(typing_context, name, operands, low, high, scratch):
    """Items low..high-1, of PANELS_BLOCK panels, times all tokens; see Operands."""
    panel, isa, from_rows = split_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        o = Operands(*integers(e, operands, 13))
        tile = _Tile(e, panel, isa)
        panel_bytes = tile.group_bytes * GROUPS_CHUNK
        tile_at = e.room(panel_bytes * PANELS_BLOCK)
        # Two float sums for each panel and token of a block.
        sums_at = e.room(2 * BYTES * PANELS_BLOCK * TOKENS_BLOCK)
        room = builder.ptrtoint(cgutils.alloca_once(builder, FLOATS), I64)
        # Activations of a tile of tokens as 16 bits.
        wide_at = e.room(LINE * GROUPS_CHUNK * TOKENS_TILE) if tile.wide else None
        source = Source(e, panel, from_rows, o)
        counts = _Counts(e)
        chunk_blocks = GROUPS_CHUNK // panel.n_groups

        def sums_of(number: Value, token: Value) -> Value:
            return builder.add(sums_at, scaled(builder, builder.add(scaled(builder, token, PANELS_BLOCK), number), 64))

        def blocks_of(total: Value, size: int) -> Any:
            return cgutils.for_range(builder, builder.sdiv(builder.add(total, I64(size - 1)), I64(size)))

        first, end = panel_range(builder, o, low, high, PANELS_BLOCK)
        with (
            blocks_of(o.n_tokens, TOKENS_BLOCK) as token_blocks,
            cgutils.for_range(builder, builder.sub(high, low)) as items,
        ):
            first_token = scaled(builder, token_blocks.index, TOKENS_BLOCK)
            first_panel = builder.add(first, scaled(builder, items.index, PANELS_BLOCK))
            n_tokens = smaller(builder, builder.sub(o.n_tokens, first_token), I64(TOKENS_BLOCK))
            n_panels = smaller(builder, builder.sub(end, first_panel), I64(PANELS_BLOCK))
            x = builder.add(o.x, builder.mul(first_token, o.x_bytes))
            with cgutils.for_range(builder, scaled(builder, n_tokens, 2 * PANELS_BLOCK)) as cells:
                zero = ir.Constant(FLOATS, [0.0] * ROWS)
                e.store(zero, builder.add(sums_at, scaled(builder, cells.index, BYTES)), align=BYTES)

            with blocks_of(o.n_blocks, chunk_blocks) as chunks:
                first_block = scaled(builder, chunks.index, chunk_blocks)
                n_blocks = smaller(builder, builder.sub(o.n_blocks, first_block), I64(chunk_blocks))
                n_groups = scaled(builder, n_blocks, panel.n_groups)
                with cgutils.for_range(builder, n_panels) as unpacked:
                    opened = source.open(builder.add(first_panel, unpacked.index))
                    place = builder.add(tile_at, scaled(builder, unpacked.index, panel_bytes))
                    with cgutils.for_range(builder, n_blocks) as blocks:
                        address = opened.block(builder.add(first_block, blocks.index))
                        target = builder.add(place, scaled(builder, blocks.index, panel.n_groups * tile.group_bytes))
                        for number, group in enumerate(panel.read(Block(e, panel, isa, address))):
                            tile.write(e.at(target, number * tile.group_bytes), group)
                chunk_x = builder.add(x, scaled(builder, first_block, LINE * panel.n_groups))
                with blocks_of(n_tokens, TOKENS_TILE) as token_tiles:
                    tokens = _clamped(builder, token_tiles.index, TOKENS_TILE, n_tokens)
                    lines = [builder.add(chunk_x, builder.mul(token, o.x_bytes)) for token in tokens]
                    inputs = lines
                    if wide_at is not None:
                        inputs = [e.at(wide_at, LINE * GROUPS_CHUNK * index) for index in range(TOKENS_TILE)]
                        with cgutils.for_range(builder, n_groups) as groups:
                            offset = scaled(builder, groups.index, LINE)
                            for line, target in zip(lines, inputs, strict=True):
                                tile.widen(builder.add(line, offset), builder.add(target, offset))
                    with blocks_of(n_panels, PANELS_TILE) as panel_tiles:
                        numbers = _clamped(builder, panel_tiles.index, PANELS_TILE, n_panels)
                        tiles = [builder.add(tile_at, scaled(builder, number, panel_bytes)) for number in numbers]
                        cells = [[sums_of(number, token) for token in tokens] for number in numbers]
                        _multiply(e, tile, tiles, (lines, inputs), cells, n_groups, counts)

            with (
                cgutils.for_range(builder, n_tokens) as done_tokens,
                cgutils.for_range(builder, n_panels) as done_panels,
            ):
                cell = sums_of(done_panels.index, done_tokens.index)
                value = builder.fadd(e.load(cell, FLOATS, 0, BYTES), e.load(cell, FLOATS, BYTES, BYTES))
                token = builder.add(first_token, done_tokens.index)
                store_sums(e, o, builder.add(first_panel, done_panels.index), token, value, room)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _multiply(
    e: Emitter,
    tile: _Tile,
    tiles: list[Value],
    tokens: tuple[list[Value], list[Value]],
    cells: list[list[Value]],
    n_groups: Value,
    counts: "_Counts",
) -> None:
    """Adds n_groups groups of the tiles times activations to the float sums at `cells`.

    Of each token there are lines of activations, and where the numbers to multiply are: there, or widened elsewhere.

    A tile at the edge repeats its last panel or token: both copies read the same sums and write the same ones, as the
    sums of all are read before any is written.
    """
    b, (lines, inputs) = e.builder, tokens
    pairs = [(p, t) for p in range(len(tiles)) for t in range(len(lines))]
    for part, add in enumerate((_multiply_group, _minima_of_group)[: 2 if tile.n_mins else 1]):
        kept = {pair: cgutils.alloca_once(b, FLOATS) for pair in pairs}
        for p, t in pairs:
            b.store(e.load(cells[p][t], FLOATS, BYTES * part, BYTES), kept[p, t])
        with cgutils.for_range(b, n_groups) as groups:
            starts = [b.add(start, scaled(b, groups.index, tile.group_bytes)) for start in tiles]
            offset = scaled(b, groups.index, LINE)
            places, numbers = ([b.add(line, offset) for line in part] for part in (lines, inputs))
            add(e, tile, starts, (places, numbers), kept, counts)
        for p, t in pairs:
            e.store(b.load(kept[p, t]), cells[p][t], BYTES * part, BYTES)


class _Counts:
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


def _multiply_group(
    e: Emitter,
    tile: _Tile,
    starts: list[Value],
    tokens: tuple[list[Value], list[Value]],
    kept: dict[tuple[int, int], Value],
    counts: _Counts,
) -> None:
    """Adds the products of one group."""
    b, (places, inputs) = e.builder, tokens
    arithmetic, span = tile.isa(e, tile.panel.largest), span_steps(tile.panel, tile.isa)
    unit = min(span, tile.isa.steps_at_once)
    ints = {pair: [cgutils.alloca_once(b, V32) for _ in range(tile.n_scales)] for pair in kept}
    sums = {pair: cgutils.alloca_once(b, tile.isa.accumulator) for pair in kept}
    for at in chain.from_iterable(ints.values()):
        b.store(zeros(V32), at)

    def add_span(first: Value, which: int) -> None:
        """Steps from number `first` on, to the sums of scale `which`."""
        for at in sums.values():
            b.store(zeros(tile.isa.accumulator), at)

        def add_unit(begin: Value) -> None:
            for step in range(unit):
                if unit > 2:
                    hold(e)
                number = b.add(begin, I64(step))
                weights = [tile.weights(b.add(start, scaled(b, number, BYTES))) for start in starts]
                for t, place in enumerate(inputs):
                    four = tile.activations(b.add(place, scaled(b, number, 4)))
                    for p, these in enumerate(weights):
                        b.store(arithmetic.add(b.load(sums[p, t]), these, four), sums[p, t])

        if span == unit:
            add_unit(first)
        else:
            with counts.loop(span // unit) as units:
                add_unit(b.add(first, scaled(b, units.index, unit)))
        factors: list[Value | None] = [None] * len(starts)
        if tile.n_factors:
            # Each factor belongs to as many steps as the others.
            index = b.sdiv(first, I64(tile.n_steps // tile.n_factors))
            offset = b.add(scaled(b, index, BYTES), I64(BYTES * tile.n_steps))
            factors = [tile.factor(b.add(start, offset)) for start in starts]
        for (p, t), at in sums.items():
            part = arithmetic.finish(b.load(at), factors[p])
            total = ints[p, t][which]
            b.store(b.add(b.load(total), part), total)

    steps = tile.n_steps // tile.n_scales
    for which in range(tile.n_scales):
        if span == steps:
            add_span(I64(which * steps), which)
        elif 2 * span == steps:
            for first in (0, span):
                add_span(I64(which * steps + first), which)
        else:
            with counts.loop(steps // span) as spans:
                add_span(b.add(I64(which * steps), scaled(b, spans.index, span)), which)
    scales = [tile.scales(start) for start in starts]
    for (p, t), at in kept.items():
        totals = [b.load(total) for total in ints[p, t]]
        b.store(add_products(e, totals, scales[p], places[t], b.load(at)), at)


def _minima_of_group(
    e: Emitter,
    tile: _Tile,
    starts: list[Value],
    tokens: tuple[list[Value], list[Value]],
    kept: dict[tuple[int, int], Value],
    counts: _Counts,
) -> None:
    """Adds the minima of one group."""
    mins = [tile.mins(start) for start in starts]
    for (p, t), at in kept.items():
        e.builder.store(add_minima(e, mins[p], tokens[0][t], e.builder.load(at)), at)


def _clamped(builder: Any, group: Value, size: int, high: Value) -> list[Value]:
    """Indices group * size + 0..size-1, none above high - 1."""
    start, last = scaled(builder, group, size), builder.sub(high, I64(1))
    return [smaller(builder, builder.add(start, I64(i)), last) for i in range(size)]
