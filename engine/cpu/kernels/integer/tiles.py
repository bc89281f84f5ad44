"""Products of packed weights with many rows of activations: panels are unpacked once, then multiplied in tiles.

The sums are those of rows.py, in the same order, so the results have the same bits.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import I64, Value
from engine.cpu.kernels.integer.activations import scaled
from engine.cpu.kernels.integer.groups import Kind, smaller
from engine.cpu.kernels.integer.panels import FLOATS, Block
from engine.cpu.kernels.integer.rows import Operands, Source, panel_range, store_sums
from engine.cpu.kernels.integer.tile_groups import GROUPS_CHUNK, VECTORS_TILE, Counts, Tile, multiply
from engine.cpu.kernels.isa import BYTES, ROWS
from engine.cpu.kernels.stepping import STEP, emitter, has_32_registers, integers

PANELS_BLOCK = 4
"""Panels of an item, unpacked together: quants of 256 columns take 8 KB."""

TOKENS_BLOCK = 128
"""Tokens between two unpackings, at most: their float sums take 16 KB, and unpacking costs 2 % of their products."""

LONG_ROW = 12 << 10
"""Bytes of a row of activations beyond which it is half as many, so that they stay in the second-level cache: with 8192
columns 203 instead of 182 GMAC/s on a core of Emerald Rapids (Q4_K), with 14336 203 instead of 196."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"tile_panels": STEP}
"""Argument types of the kernel."""


@intrinsic(prefer_literal=True)
def tile_panels(typing_context, name, operands, low, high, scratch):
    """Items low..high-1, of PANELS_BLOCK panels, times all tokens; see Operands."""
    kind = Kind.of(name)
    panel, line_bytes = kind.panel, kind.line.n_bytes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        o = Operands(*integers(e, operands, 13))
        tile = Tile(e, kind)
        panel_bytes = tile.group_bytes * GROUPS_CHUNK
        # Float sums for each panel and token of a block: of products, and of minima.
        panels_block = PANELS_BLOCK * tile.items
        cell_bytes, n_places = tile.vector_bytes * (1 + (tile.n_mins > 0)), panels_block // tile.side
        sums_at = e.room(cell_bytes * n_places * TOKENS_BLOCK)
        room = builder.ptrtoint(cgutils.alloca_once(builder, FLOATS), I64)
        tile_at = e.room(panel_bytes * n_places)
        copied_at = e.room(tile.copied_bytes * tile.n_tokens) if tile.copies else None
        source = Source(e, panel, kind.from_rows, o)
        counts = Counts(e)
        panels_tile = tile.vectors if has_32_registers(context) else min(tile.vectors, VECTORS_TILE)
        if tile.matrices is not None:
            tile.matrices.configure()
        chunk_blocks = GROUPS_CHUNK // panel.n_groups
        long = builder.icmp_signed(">", o.x_bytes, I64(LONG_ROW))
        tokens_block = builder.select(long, I64(TOKENS_BLOCK // 2), I64(TOKENS_BLOCK))

        def sums_of(place: Value, token: Value) -> Value:
            """Those of a register tile are side by side."""
            (down, row), (along, column) = (
                (builder.udiv(index, I64(size)), builder.urem(index, I64(size)))
                for index, size in ((token, tile.n_tokens), (place, panels_tile))
            )
            number = builder.add(scaled(builder, down, n_places // panels_tile), along)
            inside = builder.add(scaled(builder, column, tile.n_tokens), row)
            cell = builder.add(scaled(builder, number, tile.n_tokens * panels_tile), inside)
            return builder.add(sums_at, scaled(builder, cell, cell_bytes))

        def place_of(number: Value) -> tuple[Value, Value]:
            """Which vectors the panel shares, and where it begins in each."""
            part = scaled(builder, builder.and_(number, I64(tile.side - 1)), BYTES)
            return builder.sdiv(number, I64(tile.side)), part

        def blocks_of(total: Value, size: int | Value) -> Any:
            size = I64(size) if isinstance(size, int) else size
            return cgutils.for_range(builder, builder.sdiv(builder.add(total, builder.sub(size, I64(1))), size))

        first, end = panel_range(builder, o, low, high, PANELS_BLOCK)
        with (
            blocks_of(o.n_tokens, tokens_block) as token_blocks,
            blocks_of(builder.sub(end, first), panels_block) as panel_blocks,
        ):
            first_token = builder.mul(token_blocks.index, tokens_block)
            first_panel = builder.add(first, scaled(builder, panel_blocks.index, panels_block))
            n_tokens = smaller(builder, builder.sub(o.n_tokens, first_token), tokens_block)
            n_panels = smaller(builder, builder.sub(end, first_panel), I64(panels_block))
            x = builder.add(o.x, builder.mul(first_token, o.x_bytes))
            # Of panels that share vectors the last one is repeated where one is missing.
            n_vectors = builder.sdiv(builder.add(n_panels, I64(tile.side - 1)), I64(tile.side))
            with cgutils.for_range(builder, I64(TOKENS_BLOCK * n_places * cell_bytes // BYTES)) as cells:
                zero = ir.Constant(FLOATS, [0.0] * ROWS)
                e.store(zero, builder.add(sums_at, scaled(builder, cells.index, BYTES)), align=BYTES)

            with blocks_of(o.n_blocks, chunk_blocks) as chunks:
                first_block = scaled(builder, chunks.index, chunk_blocks)
                n_blocks = smaller(builder, builder.sub(o.n_blocks, first_block), I64(chunk_blocks))
                n_groups = scaled(builder, n_blocks, panel.n_groups)
                with cgutils.for_range(builder, scaled(builder, n_vectors, tile.side)) as unpacked:
                    number = smaller(builder, unpacked.index, builder.sub(n_panels, I64(1)))
                    opened = source.open(builder.add(first_panel, number))
                    which, part = place_of(unpacked.index)
                    place = builder.add(tile_at, builder.add(scaled(builder, which, panel_bytes), part))
                    with cgutils.for_range(builder, n_blocks) as blocks:
                        address = opened.block(builder.add(first_block, blocks.index))
                        target = builder.add(place, scaled(builder, blocks.index, panel.n_groups * tile.group_bytes))
                        for number, group in enumerate(Block(e, panel, tile.isa, address).groups()):
                            tile.write(e.at(target, number * tile.group_bytes), group)
                chunk_x = builder.add(x, scaled(builder, first_block, line_bytes * panel.n_groups))
                with blocks_of(n_tokens, tile.n_tokens) as token_tiles:
                    first_place, tokens = _clamped(builder, token_tiles.index, tile.n_tokens, n_tokens)
                    lines = [builder.add(chunk_x, builder.mul(token, o.x_bytes)) for token in tokens]
                    inputs = lines
                    if copied_at is not None:
                        inputs = [e.at(copied_at, tile.copied_bytes * index) for index in range(tile.n_tokens)]
                        with cgutils.for_range(builder, n_groups) as groups:
                            offset = scaled(builder, groups.index, line_bytes)
                            for line, target in zip(lines, inputs, strict=True):
                                tile.copy(builder.add(line, offset), builder.add(target, offset))
                        lines = lines if tile.widens else inputs
                    with blocks_of(n_vectors, panels_tile) as panel_tiles:
                        first_vector, numbers = _clamped(builder, panel_tiles.index, panels_tile, n_vectors)
                        tiles = [builder.add(tile_at, scaled(builder, number, panel_bytes)) for number in numbers]
                        cells = sums_of(first_vector, first_place)
                        multiply(e, tile, tiles, (lines, inputs), cells, n_blocks, counts)

            with (
                cgutils.for_range(builder, n_tokens) as done_tokens,
                cgutils.for_range(builder, n_panels) as done_panels,
            ):
                which, part = place_of(done_panels.index)
                cell = builder.add(sums_of(which, done_tokens.index), part)
                value = e.load(cell, FLOATS, 0, BYTES)
                if tile.n_mins:
                    value = builder.fadd(value, e.load(cell, FLOATS, tile.vector_bytes, BYTES))
                token = builder.add(first_token, done_tokens.index)
                store_sums(e, o, builder.add(first_panel, done_panels.index), token, value, room)
        if tile.matrices is not None:
            tile.matrices.release()
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _clamped(builder: Any, group: Value, size: int, high: Value) -> tuple[Value, list[Value]]:
    """The index group * size, and that and the next ones, none above high - 1."""
    start, last = scaled(builder, group, size), builder.sub(high, I64(1))
    return start, [smaller(builder, builder.add(start, I64(i)), last) for i in range(size)]
