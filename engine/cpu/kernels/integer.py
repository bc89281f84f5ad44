"""Products of packed weights and activations of 8 bits: quantizing rows, packing panels, and the two loops over them.

Activations are quantized in blocks of 32 columns, a cache line each: 32 signed bytes q, then as float32 their scale d,
d · sum(q), and d · sum of the first and of the last 16 q. A product adds, group by group in the order of columns,
    scale · sum(q_w · q_x) · d      and      m · d · sum(q_x)
in two float32 sums per row. The inner sums are exact integers, so both loops, with any number of rows, give the same
bits: `dot_panels` reads each panel once for one token, `tile_panels` unpacks a tile of panels for many.

A kernel whose type ends in "/rows" reads rows as they lie in the file and packs each block on the way.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import F32, F64, I8, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.isa import ACTIVATION_MAX, BYTES, ISAS, ROWS, V8, V32, Isa
from engine.cpu.kernels.panels import FLOATS, GROUP, PANELS, STEPS, Block, Group, Panel, pack_block
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

LINE = 64
"""Bytes of a block of activations."""

AT_SCALE, AT_SUM, AT_FIRST, AT_LAST = 32, 36, 40, 44
"""Places of the float32 numbers in it."""

PANELS_AT_ONCE = 1
"""Panels that dot_panels multiplies side by side, so that each activation is loaded once for both."""

PANELS_TILE, TOKENS_TILE = 2, 4
"""Register tile: 2 x 4 sums fill 8 of AVX2's 16 registers."""

AHEAD = 4096
"""Bytes that dot_panels prefetches ahead."""

STEPS_AT_ONCE = 2
"""Steps per round of the innermost loop."""

PANELS_BLOCK = 4
"""Panels unpacked together: quants of 256 columns take 8 KB."""

TOKENS_BLOCK = 64
"""Tokens between two unpackings: their float sums take 16 KB, and unpacking costs a few percent of their products."""

GROUPS_CHUNK = 8
"""Groups unpacked together."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {
    "quantize": STEP,
    "pack_panels": STEP,
    "dot_panels": STEP,
    "tile_panels": STEP,
}
"""Argument types of each kernel."""


def split_name(name: types.StringLiteral) -> tuple[Panel, type[Isa], bool]:
    """What a kernel's type, "Q4_K/avx2" or "Q4_K/avx2/rows", stands for."""
    format, isa, *rows = format_name(name).split("/")
    return PANELS[format], ISAS[isa], bool(rows)


def _mul(builder: Any, a: Value, b: int) -> Value:
    return builder.mul(a, I64(b))


def _least(builder: Any, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _f32(e: Emitter, address: Value, offset: int) -> Value:
    """A float32 in all lanes."""
    return e.splat(e.load(address, F32, offset, align=4), ROWS)


@intrinsic(prefer_literal=True)
def quantize(typing_context, name, operands, low, high, scratch):
    """Blocks low..high-1 of 32 columns of float32 rows become blocks of activations.

    Operands: x, x_bytes, blocks per row, out (rows of such blocks without gaps).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, x_bytes, per_row, out = integers(e, operands, 4)
        with cgutils.for_range(builder, builder.sub(high, low)) as blocks:
            index = builder.add(low, blocks.index)
            row, block = builder.sdiv(index, per_row), builder.srem(index, per_row)
            source = builder.add(builder.add(x, builder.mul(row, x_bytes)), _mul(builder, block, 4 * GROUP))
            quantize_block(e, source, builder.add(out, _mul(builder, index, LINE)))
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def quantize_block(e: Emitter, source: Value, target: Value) -> None:
    """32 float32 at `source` become a block of activations: q = round(x / d), d = largest magnitude / 127."""
    b = e.builder
    parts = [e.load(source, FLOATS, 4 * ROWS * i, align=4) for i in range(GROUP // ROWS)]
    magnitudes = [b.bitcast(e.mask(b.bitcast(part, V32), 0x7FFFFFFF), FLOATS) for part in parts]
    largest = e.greater(e.greater(magnitudes[0], magnitudes[1]), e.greater(magnitudes[2], magnitudes[3]))
    while largest.type.count > 1:
        half = largest.type.count // 2
        largest = e.greater(e.part(largest, 0, half), e.part(largest, half, half))
    top = b.extract_element(largest, I32(0))
    scale = b.fdiv(top, e.const(top, float(ACTIVATION_MAX)))
    some = b.fcmp_ordered(">", top, e.const(top, 1e-30))  # its inverse must be finite
    inverse = b.select(some, b.fdiv(e.const(top, float(ACTIVATION_MAX)), top), e.const(top, 0.0))
    factor = e.splat(inverse, ROWS)
    # Adding 1.5 * 2**23 rounds to the nearest integer and leaves it in the low bits, whatever x is.
    rounder = e.const(factor, 12582912.0)
    sums = []
    for i, part in enumerate(parts):
        bits = b.bitcast(b.fadd(e.multiply(part, factor), rounder), V32)
        numbers = b.trunc(bits, vector(I8, ROWS))
        e.store(numbers, target, ROWS * i, align=1)
        sums.append(b.sext(numbers, V32))
    totals = [_sum_lanes(e, b.add(sums[i], sums[i + 1])) for i in (0, 2)]
    e.store(scale, target, AT_SCALE)
    for total, place in ((b.add(*totals), AT_SUM), (totals[0], AT_FIRST), (totals[1], AT_LAST)):
        e.store(e.multiply(b.sitofp(total, F32), scale), target, place)


def quantize_blocks(e: Emitter, source: Value, target: Value, first: Value, count: Value) -> None:
    """Quantizes blocks first..first+count-1 of floats without gaps."""
    with cgutils.for_range(e.builder, count) as blocks:
        index = e.builder.add(first, blocks.index)
        floats = e.builder.add(source, _mul(e.builder, index, 4 * GROUP))
        quantize_block(e, floats, e.builder.add(target, _mul(e.builder, index, LINE)))


def _sum_lanes(e: Emitter, value: Value) -> Value:
    while value.type.count > 1:
        half = value.type.count // 2
        value = e.builder.add(e.part(value, 0, half), e.part(value, half, half))
    return e.builder.extract_element(value, I32(0))


@intrinsic(prefer_literal=True)
def pack_panels(typing_context, name, operands, low, high, scratch):
    """Writes panels low..high-1; the last one repeats the last row.

    Operands: raw, row_bytes, n_rows, n_blocks, out (panels without gaps).
    """
    panel, _, _ = split_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        raw, row_bytes, n_rows, n_blocks, out = integers(e, operands, 5)
        with cgutils.for_range(builder, builder.sub(high, low)) as panels:
            index = builder.add(low, panels.index)
            rows = _row_starts(builder, raw, row_bytes, n_rows, index)
            target = builder.add(out, builder.mul(index, _mul(builder, n_blocks, panel.n_bytes)))
            with cgutils.for_range(builder, n_blocks) as blocks:
                offset = _mul(builder, blocks.index, panel.type_size)
                place = builder.add(target, _mul(builder, blocks.index, panel.n_bytes))
                pack_block(e, panel, [builder.add(row, offset) for row in rows], place)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _row_starts(builder: Any, raw: Value, row_bytes: Value, n_rows: Value, panel: Value) -> list[Value]:
    """Addresses of a panel's eight rows, none beyond the last."""
    first, last = _mul(builder, panel, ROWS), builder.sub(n_rows, I64(1))
    rows = (_least(builder, builder.add(first, I64(lane)), last) for lane in range(ROWS))
    return [builder.add(raw, builder.mul(row, row_bytes)) for row in rows]


@dataclass(frozen=True)
class _Operands:
    """Of dot_panels and tile_panels, in this order.

    packed: panels without gaps (or the first row, of row_bytes; otherwise row_bytes is not read); n_blocks per row;
    n_rows; x: activations, rows x_bytes apart; out: float32 (T, N), rows out_bytes apart; scale: a float64; bias: (N,)
    or 0; residual: like out, or 0. out = scale · (x W') + bias + residual.
    """

    packed: Value
    row_bytes: Value
    n_blocks: Value
    n_rows: Value
    x: Value
    x_bytes: Value
    n_tokens: Value
    out: Value
    out_bytes: Value
    scale: Value
    bias: Value
    residual: Value
    residual_bytes: Value


class _Source:
    """Where the blocks of a panel come from: the panel itself, or rows that are packed block by block."""

    def __init__(self, e: Emitter, panel: Panel, from_rows: bool, o: _Operands) -> None:
        self._e, self._panel, self._o = e, panel, o
        self._place = None
        if from_rows:
            self._place = _aligned_room(e.builder, panel.n_bytes)
        self._start: Value | list[Value] = I64(0)

    def open(self, index: Value) -> "_Source":
        """Begin with panel `index`."""
        b, o = self._e.builder, self._o
        opened = object.__new__(_Source)
        opened.__dict__.update(self.__dict__)
        if self._place is not None:
            opened._start = _row_starts(b, o.packed, o.row_bytes, o.n_rows, index)
        else:
            opened._start = b.add(o.packed, b.mul(index, _mul(b, o.n_blocks, self._panel.n_bytes)))
        return opened

    def block(self, index: Value) -> Value:
        """Address of a block of the panel."""
        b = self._e.builder
        if self._place is None:
            return b.add(self._start, _mul(b, index, self._panel.n_bytes))
        assert isinstance(self._start, list)
        offset = _mul(b, index, self._panel.type_size)
        pack_block(self._e, self._panel, [b.add(row, offset) for row in self._start], self._place)
        return self._place


def _store(e: Emitter, o: _Operands, panel: Value, token: Value, sums: Value, room: Value) -> None:
    """Writes eight sums of a token, as many of them as there are rows, with scale, bias and residual."""
    b = e.builder
    scale = b.fptrunc(b.bitcast(o.scale, F64), F32)
    row = _mul(b, panel, ROWS)
    at_row = _mul(b, row, 4)
    target = b.add(b.add(o.out, b.mul(token, o.out_bytes)), at_row)
    beside = b.add(b.mul(token, o.residual_bytes), at_row)

    def finish(value: Value, wide: bool, target: Value, at_row: Value, beside: Value) -> None:
        kind = FLOATS if wide else F32
        value = e.multiply(value, e.splat(scale, ROWS) if wide else scale)
        for base, offset in ((o.bias, at_row), (o.residual, beside)):
            kept = cgutils.alloca_once_value(b, value)
            with b.if_then(b.icmp_signed("!=", base, I64(0))):
                b.store(b.fadd(value, e.load(b.add(base, offset), kind, align=4)), kept)
            value = b.load(kept)
        e.store(value, target)

    left = b.sub(o.n_rows, row)
    with b.if_else(b.icmp_signed(">=", left, I64(ROWS))) as (whole, partial):
        with whole:
            finish(sums, True, target, at_row, beside)
        with partial:
            e.store(sums, room, align=4)
            with cgutils.for_range(b, left) as rows:
                more = _mul(b, rows.index, 4)
                one = e.load(b.add(room, more), F32, align=4)
                finish(one, False, b.add(target, more), b.add(at_row, more), b.add(beside, more))


def span_steps(panel: Panel, isa: type[Isa]) -> int:
    """Steps whose products are added before the sum is brought to 32 bits: a power of two."""
    steps = STEPS // max(1, panel.n_factors)
    while steps > isa.most(panel.largest):
        steps //= 2
    return steps


def _zero(kind: ir.Type) -> Value:
    return ir.Constant(kind, [0] * kind.count)


def _broadcast(e: Emitter, line: Value, step: int) -> Value:
    """Four activations in all lanes."""
    return e.builder.bitcast(e.splat(e.load(line, I32, 4 * step), ROWS), V8)


def _add_products(e: Emitter, ints: Value, scale: Value, line: Value, total: Value) -> Value:
    """The float sum of products after one more group of 32 columns."""
    dot = e.builder.sitofp(ints, FLOATS)
    return e.multiply_add(e.multiply(dot, scale), _f32(e, line, AT_SCALE), total)


def _add_minima(e: Emitter, mins: tuple[Value, ...], line: Value, least: Value) -> Value:
    """The float sum of minima after one more group."""
    for minimum, place in zip(mins, (AT_SUM,) if len(mins) == 1 else (AT_FIRST, AT_LAST), strict=False):
        least = e.multiply_add(minimum, _f32(e, line, place), least)
    return least


def hold(e: Emitter) -> None:
    """Keeps LLVM from moving loads across this place; costs no instruction.

    Left alone, it would load and unpack much more than there are registers for before it multiplies anything.
    """
    e.builder.fence("seq_cst", targetscope="singlethread")


def _group_dot(e: Emitter, panel: Panel, isa: type[Isa], group: Group, line: Value) -> Value:
    """The integer sums of a group in registers, 8 × i32."""
    arithmetic, span = isa(e, panel.largest), span_steps(panel, isa)
    total = None
    for first in range(0, STEPS, span):
        part = _zero(isa.accumulator)
        for step in range(first, first + span):
            if step % STEPS_AT_ONCE == 0:
                hold(e)
            part = arithmetic.add(part, group.steps[step], _broadcast(e, line, step))
        factor = isa.factor(e, group.factors[first * len(group.factors) // STEPS]) if group.factors else None
        part = arithmetic.finish(part, factor)
        total = part if total is None else e.builder.add(total, part)
    return total


def _prefetch(e: Emitter, block: Value, panel: Panel, group: int) -> None:
    """Asks for a group's share of the bytes AHEAD of a block.

    The words of a block are not read in the order of addresses, which the processor's own prefetching expects.
    """
    share = panel.n_bytes // panel.n_groups
    for offset in range(-group * share % LINE, share, LINE):
        e.prefetch(e.at(block, AHEAD + group * share + offset))


@intrinsic(prefer_literal=True)
def dot_panels(typing_context, name, operands, low, high, scratch):
    """Items low..high-1, of PANELS_AT_ONCE panels, times each token; see _Operands."""
    panel, isa, from_rows = split_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        o = _Operands(*integers(e, operands, 13))
        sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(2)] for _ in range(PANELS_AT_ONCE)]
        room = builder.ptrtoint(cgutils.alloca_once(builder, FLOATS), I64)
        sources = [_Source(e, panel, from_rows, o) for _ in sums]
        first, end = panel_range(builder, o, low, high, PANELS_AT_ONCE)
        with (
            cgutils.for_range(builder, o.n_tokens) as tokens,
            cgutils.for_range(builder, builder.sub(high, low)) as items,
        ):
            # The last item may lack a panel: it then computes the one before twice.
            start = builder.add(first, _mul(builder, items.index, PANELS_AT_ONCE))
            indices = [
                _least(builder, builder.add(start, I64(i)), builder.sub(end, I64(1))) for i, _ in enumerate(sums)
            ]
            opened = [source.open(index) for source, index in zip(sources, indices, strict=True)]
            x = builder.add(o.x, builder.mul(tokens.index, o.x_bytes))
            for at in chain.from_iterable(sums):
                builder.store(_zero(FLOATS), at)
            with cgutils.for_range(builder, o.n_blocks) as blocks:
                read = [Block(e, panel, isa, source.block(blocks.index)) for source in opened]
                lines = builder.add(x, _mul(builder, blocks.index, LINE * panel.n_groups))
                for number, groups in enumerate(zip(*map(panel.read, read), strict=True)):
                    line = e.at(lines, LINE * number)
                    for block, group, (total, least) in zip(read, groups, sums, strict=True):
                        if not from_rows:
                            _prefetch(e, block.address, panel, number)
                        ints = _group_dot(e, panel, isa, group, line)
                        builder.store(_add_products(e, ints, group.scale, line, builder.load(total)), total)
                        builder.store(_add_minima(e, group.mins, line, builder.load(least)), least)
            for index, (total, least) in zip(indices, sums, strict=True):
                _store(e, o, index, tokens.index, builder.fadd(builder.load(total), builder.load(least)), room)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def panel_range(builder: Any, o: _Operands, low: Value, high: Value, size: int) -> tuple[Value, Value]:
    """The first panel of items low..high-1 of `size` panels each, and the one after their last."""
    n_panels = builder.sdiv(builder.add(o.n_rows, I64(ROWS - 1)), I64(ROWS))
    return _mul(builder, low, size), _least(builder, _mul(builder, high, size), n_panels)


class _Tile:
    """Unpacked groups in memory: 8 vectors of weights, factors, the scale and minima, 32 bytes each."""

    def __init__(self, e: Emitter, panel: Panel, isa: type[Isa]) -> None:
        self._e, self.panel, self.isa = e, panel, isa
        self.n_factors = panel.n_factors
        self.n_mins = panel.n_mins if isa.takes_signed or panel.largest <= ACTIVATION_MAX else 1
        self.group_bytes = BYTES * (STEPS + 1 + self.n_factors + self.n_mins)

    def write(self, address: Value, group: Group) -> None:
        """Puts a group there."""
        factors = (self.isa.factor(self._e, factor) for factor in group.factors)
        vectors = (*group.steps, *factors, group.scale, *group.mins)
        assert BYTES * len(vectors) == self.group_bytes
        for index, part in enumerate(vectors):
            self._e.store(part, address, BYTES * index, align=BYTES)

    def weights(self, address: Value) -> Value:
        """Weights of the step at an address."""
        return self._e.load(address, V8, align=BYTES)

    def factor(self, address: Value) -> Value:
        """The factor at an address."""
        return self._e.load(address, self.isa.factor(self._e, _zero(V32)).type, align=BYTES)

    def scale(self, address: Value) -> Value:
        """Scale of the group at an address."""
        return self._e.load(address, FLOATS, BYTES * (STEPS + self.n_factors), BYTES)

    def mins(self, address: Value) -> tuple[Value, ...]:
        """Its minima."""
        first = STEPS + self.n_factors + 1
        return tuple(self._e.load(address, FLOATS, BYTES * (first + i), BYTES) for i in range(self.n_mins))


@intrinsic(prefer_literal=True)
def tile_panels(typing_context, name, operands, low, high, scratch):
    """Items low..high-1, of PANELS_BLOCK panels, times all tokens; see _Operands."""
    panel, isa, from_rows = split_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        o = _Operands(*integers(e, operands, 13))
        tile = _Tile(e, panel, isa)
        panel_bytes = tile.group_bytes * GROUPS_CHUNK
        tile_at = _aligned_room(builder, panel_bytes * PANELS_BLOCK)
        # Two float sums for each panel and token of a block.
        sums_at = _aligned_room(builder, 2 * BYTES * PANELS_BLOCK * TOKENS_BLOCK)
        room = builder.ptrtoint(cgutils.alloca_once(builder, FLOATS), I64)
        source = _Source(e, panel, from_rows, o)
        counts = _Counts(e)
        chunk_blocks = GROUPS_CHUNK // panel.n_groups

        def sums_of(number: Value, token: Value) -> Value:
            return builder.add(sums_at, _mul(builder, builder.add(_mul(builder, token, PANELS_BLOCK), number), 64))

        def blocks_of(total: Value, size: int) -> Any:
            return cgutils.for_range(builder, builder.sdiv(builder.add(total, I64(size - 1)), I64(size)))

        first, end = panel_range(builder, o, low, high, PANELS_BLOCK)
        with (
            blocks_of(o.n_tokens, TOKENS_BLOCK) as token_blocks,
            cgutils.for_range(builder, builder.sub(high, low)) as items,
        ):
            first_token = _mul(builder, token_blocks.index, TOKENS_BLOCK)
            first_panel = builder.add(first, _mul(builder, items.index, PANELS_BLOCK))
            n_tokens = _least(builder, builder.sub(o.n_tokens, first_token), I64(TOKENS_BLOCK))
            n_panels = _least(builder, builder.sub(end, first_panel), I64(PANELS_BLOCK))
            x = builder.add(o.x, builder.mul(first_token, o.x_bytes))
            with cgutils.for_range(builder, _mul(builder, n_tokens, 2 * PANELS_BLOCK)) as cells:
                zero = ir.Constant(FLOATS, [0.0] * ROWS)
                e.store(zero, builder.add(sums_at, _mul(builder, cells.index, BYTES)), align=BYTES)

            with blocks_of(o.n_blocks, chunk_blocks) as chunks:
                first_block = _mul(builder, chunks.index, chunk_blocks)
                n_blocks = _least(builder, builder.sub(o.n_blocks, first_block), I64(chunk_blocks))
                n_groups = _mul(builder, n_blocks, panel.n_groups)
                with cgutils.for_range(builder, n_panels) as unpacked:
                    opened = source.open(builder.add(first_panel, unpacked.index))
                    place = builder.add(tile_at, _mul(builder, unpacked.index, panel_bytes))
                    with cgutils.for_range(builder, n_blocks) as blocks:
                        address = opened.block(builder.add(first_block, blocks.index))
                        target = builder.add(place, _mul(builder, blocks.index, panel.n_groups * tile.group_bytes))
                        for number, group in enumerate(panel.read(Block(e, panel, isa, address))):
                            tile.write(e.at(target, number * tile.group_bytes), group)
                chunk_x = builder.add(x, _mul(builder, first_block, LINE * panel.n_groups))
                with blocks_of(n_tokens, TOKENS_TILE) as token_tiles:
                    tokens = _clamped(builder, token_tiles.index, TOKENS_TILE, n_tokens)
                    lines = [builder.add(chunk_x, builder.mul(token, o.x_bytes)) for token in tokens]
                    with blocks_of(n_panels, PANELS_TILE) as panel_tiles:
                        numbers = _clamped(builder, panel_tiles.index, PANELS_TILE, n_panels)
                        tiles = [builder.add(tile_at, _mul(builder, number, panel_bytes)) for number in numbers]
                        cells = [[sums_of(number, token) for token in tokens] for number in numbers]
                        _multiply(e, tile, tiles, lines, cells, n_groups, counts)

            with (
                cgutils.for_range(builder, n_tokens) as done_tokens,
                cgutils.for_range(builder, n_panels) as done_panels,
            ):
                cell = sums_of(done_panels.index, done_tokens.index)
                value = builder.fadd(e.load(cell, FLOATS, 0, BYTES), e.load(cell, FLOATS, BYTES, BYTES))
                token = builder.add(first_token, done_tokens.index)
                _store(e, o, builder.add(first_panel, done_panels.index), token, value, room)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _multiply(
    e: Emitter,
    tile: _Tile,
    tiles: list[Value],
    lines: list[Value],
    cells: list[list[Value]],
    n_groups: Value,
    counts: "_Counts",
) -> None:
    """Adds n_groups groups of the tiles times the lines of activations to the float sums at `cells`.

    A tile at the edge repeats its last panel or token: both copies read the same sums and write the same ones, as the
    sums of all are read before any is written.
    """
    b = e.builder
    pairs = [(p, t) for p in range(len(tiles)) for t in range(len(lines))]
    for part, add in enumerate((_multiply_group, _minima_of_group)[: 2 if tile.n_mins else 1]):
        kept = {pair: cgutils.alloca_once(b, FLOATS) for pair in pairs}
        for p, t in pairs:
            b.store(e.load(cells[p][t], FLOATS, BYTES * part, BYTES), kept[p, t])
        with cgutils.for_range(b, n_groups) as groups:
            starts = [b.add(start, _mul(b, groups.index, tile.group_bytes)) for start in tiles]
            places = [b.add(line, _mul(b, groups.index, LINE)) for line in lines]
            add(e, tile, starts, places, kept, counts)
        for p, t in pairs:
            e.store(b.load(kept[p, t]), cells[p][t], BYTES * part, BYTES)


class _Counts:
    """Constants that LLVM cannot see through, to keep loops loops.

    Unrolled, the products would be reordered so that many weights are held at once, more than there are registers.
    """

    def __init__(self, e: Emitter) -> None:
        self._e = e
        self._room = _aligned_room(e.builder, 8 * STEPS)
        for number in range(1, STEPS + 1):
            e.store(I64(number), self._room, 8 * (number - 1), align=8)

    def loop(self, count: int) -> Any:
        """A loop of `count` rounds."""
        return cgutils.for_range(self._e.builder, self._e.load(self._room, I64, 8 * (count - 1), align=8))


def _multiply_group(
    e: Emitter,
    tile: _Tile,
    starts: list[Value],
    places: list[Value],
    kept: dict[tuple[int, int], Value],
    counts: _Counts,
) -> None:
    """Adds the products of one group."""
    b = e.builder
    arithmetic, span = tile.isa(e, tile.panel.largest), span_steps(tile.panel, tile.isa)
    unit = min(span, STEPS_AT_ONCE)
    ints = {pair: cgutils.alloca_once(b, V32) for pair in kept}
    sums = {pair: cgutils.alloca_once(b, tile.isa.accumulator) for pair in kept}
    for at in ints.values():
        b.store(_zero(V32), at)

    def add_span(first: Value) -> None:
        """Steps from number `first` on."""
        for at in sums.values():
            b.store(_zero(tile.isa.accumulator), at)

        def add_unit(begin: Value) -> None:
            for step in range(unit):
                number = b.add(begin, I64(step))
                weights = [tile.weights(b.add(start, _mul(b, number, BYTES))) for start in starts]
                for t, place in enumerate(places):
                    four = _broadcast(e, b.add(place, _mul(b, number, 4)), 0)
                    for p, these in enumerate(weights):
                        b.store(arithmetic.add(b.load(sums[p, t]), these, four), sums[p, t])

        if span == unit:
            add_unit(first)
        else:
            with counts.loop(span // unit) as units:
                add_unit(b.add(first, _mul(b, units.index, unit)))
        factors: list[Value | None] = [None] * len(starts)
        if tile.n_factors:
            # Each factor belongs to as many steps as the others.
            index = b.sdiv(first, I64(STEPS // tile.n_factors))
            offset = b.add(_mul(b, index, BYTES), I64(BYTES * STEPS))
            factors = [tile.factor(b.add(start, offset)) for start in starts]
        for (p, t), at in sums.items():
            part = arithmetic.finish(b.load(at), factors[p])
            b.store(b.add(b.load(ints[p, t]), part), ints[p, t])

    if span == STEPS:
        add_span(I64(0))
    else:
        with counts.loop(STEPS // span) as spans:
            add_span(_mul(b, spans.index, span))
    scales = [tile.scale(start) for start in starts]
    for (p, t), at in kept.items():
        b.store(_add_products(e, b.load(ints[p, t]), scales[p], places[t], b.load(at)), at)


def _minima_of_group(
    e: Emitter,
    tile: _Tile,
    starts: list[Value],
    places: list[Value],
    kept: dict[tuple[int, int], Value],
    counts: _Counts,
) -> None:
    """Adds the minima of one group."""
    mins = [tile.mins(start) for start in starts]
    for (p, t), at in kept.items():
        e.builder.store(_add_minima(e, mins[p], places[t], e.builder.load(at)), at)


def _clamped(builder: Any, group: Value, size: int, high: Value) -> list[Value]:
    """Indices group * size + 0..size-1, none above high - 1."""
    start, last = _mul(builder, group, size), builder.sub(high, I64(1))
    return [_least(builder, builder.add(start, I64(i)), last) for i in range(size)]


def _aligned_room(builder: Any, n_bytes: int) -> Value:
    """Address of n_bytes on the stack, at a cache line."""
    with builder.goto_entry_block():
        room = builder.alloca(I8, size=n_bytes + LINE)  # numba's own helper would also clear it
    start = builder.add(builder.ptrtoint(room, I64), I64(LINE - 1))
    return builder.and_(start, I64(-LINE))
