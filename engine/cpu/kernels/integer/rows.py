"""Products of packed weights and activations in integers: packing panels, and the loop for one row of activations.

Groups of 32 columns are added in the order of columns, as groups.py says, products and minima in two float32 sums per
row. So both loops, with any number of rows, give the same bits: `dot_panels` reads each panel once for one token,
`tile_panels` (tiles.py) unpacks a tile of panels for many.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from itertools import chain
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import F32, F64, I64, Emitter, Value
from engine.cpu.kernels.integer.activations import scaled
from engine.cpu.kernels.integer.groups import Kind, add_group, add_minima, float_at, group_sums, smaller, zeros
from engine.cpu.kernels.integer.panels import FLOATS, Block, Panel, pack_block
from engine.cpu.kernels.isa import ROWS
from engine.cpu.kernels.stepping import STEP, emitter, has_32_registers, integers

PANELS_AT_ONCE = 1
"""Panels that dot_panels multiplies side by side, so that each activation is loaded once for both."""

AHEAD, NEAR, NEAR_512 = 4096, 2048, 256
"""Bytes that dot_panels prefetches ahead; NEAR for panels that say so, NEAR_512 for those with AVX-512. On two cores
of Zen 3 (AVX2) decode steps of small models and of a 1B Q4_K_M file are 1.08 to 1.14 times as fast with 2048 as with
256, and 1.00 to 1.03 times as with 4096. On two of Zen 4 Q8_0 is read at 73 GB/s with 256 and at 62 with AHEAD, F16 at
62 to 70 and 54, Q4_0 at 69 and 64, Q6_K at 33 and 39, where no one else uses the memory."""

CACHE_LINE = 64

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"pack_panels": STEP, "dot_panels": STEP}
"""Argument types of each kernel."""


@intrinsic(prefer_literal=True)
def pack_panels(typing_context, name, operands, low, high, scratch):
    """Writes panels low..high-1; the last one repeats the last row.

    Operands: raw, row_bytes, n_rows, n_blocks, out (panels without gaps).
    """
    panel = Kind.of(name).panel

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        raw, row_bytes, n_rows, n_blocks, out = integers(e, operands, 5)
        with cgutils.for_range(builder, builder.sub(high, low)) as panels:
            index = builder.add(low, panels.index)
            rows = _row_starts(builder, raw, row_bytes, n_rows, index)
            target = builder.add(out, builder.mul(index, scaled(builder, n_blocks, panel.n_bytes)))
            with cgutils.for_range(builder, n_blocks) as blocks:
                offset = scaled(builder, blocks.index, panel.type_size)
                place = builder.add(target, scaled(builder, blocks.index, panel.n_bytes))
                pack_block(e, panel, [builder.add(row, offset) for row in rows], place)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _row_starts(builder: Any, raw: Value, row_bytes: Value, n_rows: Value, panel: Value) -> list[Value]:
    """Addresses of a panel's eight rows, none beyond the last."""
    first, last = scaled(builder, panel, ROWS), builder.sub(n_rows, I64(1))
    rows = (smaller(builder, builder.add(first, I64(lane)), last) for lane in range(ROWS))
    return [builder.add(raw, builder.mul(row, row_bytes)) for row in rows]


@dataclass(frozen=True)
class Operands:
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


class Source:
    """Where the blocks of a panel come from: the panel itself, or rows that are packed block by block."""

    def __init__(self, e: Emitter, panel: Panel, from_rows: bool, o: Operands) -> None:
        self._e, self._panel, self._o = e, panel, o
        self._place = None
        if from_rows:
            self._place = e.room(panel.n_bytes)
        self._start: Value | list[Value] = I64(0)

    def open(self, index: Value) -> "Source":
        """Begin with panel `index`."""
        b, o = self._e.builder, self._o
        opened = object.__new__(Source)
        opened.__dict__.update(self.__dict__)
        if self._place is not None:
            opened._start = _row_starts(b, o.packed, o.row_bytes, o.n_rows, index)
        else:
            opened._start = b.add(o.packed, b.mul(index, scaled(b, o.n_blocks, self._panel.n_bytes)))
        return opened

    def block(self, index: Value) -> Value:
        """Address of a block of the panel."""
        b = self._e.builder
        if self._place is None:
            return b.add(self._start, scaled(b, index, self._panel.n_bytes))
        assert isinstance(self._start, list)
        offset = scaled(b, index, self._panel.type_size)
        pack_block(self._e, self._panel, [b.add(row, offset) for row in self._start], self._place)
        return self._place


def store_sums(e: Emitter, o: Operands, panel: Value, token: Value, sums: Value, room: Value) -> None:
    """Writes eight sums of a token, as many of them as there are rows, with scale, bias and residual."""
    b = e.builder
    scale = b.fptrunc(b.bitcast(o.scale, F64), F32)
    row = scaled(b, panel, ROWS)
    at_row = scaled(b, row, 4)
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
                more = scaled(b, rows.index, 4)
                one = e.load(b.add(room, more), F32, align=4)
                finish(one, False, b.add(target, more), b.add(at_row, more), b.add(beside, more))


def _prefetch(e: Emitter, block: Value, panel: Panel, group: int, ahead: int) -> None:
    """Prefetches a group's share of the bytes `ahead` of a block.

    The words of most blocks are not read in the order of addresses, which the processor's own prefetching expects.
    """
    share = panel.n_bytes // panel.n_groups
    for offset in range(-group * share % CACHE_LINE, share, CACHE_LINE):
        e.prefetch(e.at(block, ahead + group * share + offset))


@intrinsic(prefer_literal=True)
def dot_panels(typing_context, name, operands, low, high, scratch):
    """Items low..high-1, of PANELS_AT_ONCE panels, times each token; see Operands."""
    kind = Kind.of(name)
    panel, from_rows, isa, line_bytes = kind.panel, kind.from_rows, kind.arithmetic(tiles=False), kind.line.n_bytes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        o = Operands(*integers(e, operands, 13))
        ahead = AHEAD if not panel.near else NEAR_512 if has_32_registers(context) else NEAR
        sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(2)] for _ in range(PANELS_AT_ONCE)]
        room = builder.ptrtoint(cgutils.alloca_once(builder, FLOATS), I64)
        sources = [Source(e, panel, from_rows, o) for _ in sums]
        first, end = panel_range(builder, o, low, high, PANELS_AT_ONCE)
        with (
            cgutils.for_range(builder, o.n_tokens) as tokens,
            cgutils.for_range(builder, builder.sub(high, low)) as items,
        ):
            # The last item may lack a panel: it then computes the one before twice.
            start = builder.add(first, scaled(builder, items.index, PANELS_AT_ONCE))
            indices = [
                smaller(builder, builder.add(start, I64(i)), builder.sub(end, I64(1))) for i, _ in enumerate(sums)
            ]
            opened = [source.open(index) for source, index in zip(sources, indices, strict=True)]
            x = builder.add(o.x, builder.mul(tokens.index, o.x_bytes))
            for at in chain.from_iterable(sums):
                builder.store(zeros(FLOATS), at)
            with cgutils.for_range(builder, o.n_blocks) as blocks:
                read = [Block(e, panel, isa, source.block(blocks.index)) for source in opened]
                lines = builder.add(x, scaled(builder, blocks.index, line_bytes * panel.n_groups))
                of_block: list[Value | None] = [None] * PANELS_AT_ONCE
                for number, groups in enumerate(zip(*(block.groups() for block in read), strict=True)):
                    line = e.at(lines, line_bytes * number)
                    factor = float_at(e, line, kind.line.scale)
                    for index, (block, group, (total, least)) in enumerate(zip(read, groups, sums, strict=True)):
                        if not from_rows:
                            _prefetch(e, block.address, panel, number, ahead)
                        before = of_block[index] if kind.block_scale else builder.load(total)
                        after = add_group(e, kind, group_sums(e, kind, group, line), group.scales, factor, before)
                        of_block[index] = after
                        if kind.block_scale and number == panel.n_groups - 1:
                            after = e.multiply_add(after, group.scales[0], builder.load(total))
                        if not kind.block_scale or number == panel.n_groups - 1:
                            builder.store(after, total)
                        if group.mins:
                            builder.store(add_minima(e, kind, group.mins, line, builder.load(least)), least)
            for index, (total, least) in zip(indices, sums, strict=True):
                value = builder.load(total)
                value = builder.fadd(value, builder.load(least)) if panel.n_mins else value
                store_sums(e, o, index, tokens.index, value, room)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def panel_range(builder: Any, o: Operands, low: Value, high: Value, size: int) -> tuple[Value, Value]:
    """The first panel of items low..high-1 of `size` panels each, and the one after their last."""
    n_panels = builder.sdiv(builder.add(o.n_rows, I64(ROWS - 1)), I64(ROWS))
    return scaled(builder, low, size), smaller(builder, scaled(builder, high, size), n_panels)
