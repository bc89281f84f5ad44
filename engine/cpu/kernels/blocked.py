"""The blocked product: a tile of weight rows times many rows of activations, summed in float32.

Rows of plain numbers (F32, F16, BF16 and their like) are read as they are and become float32 in registers; those of
longer blocks have been dequantized into scratch. Sums have the order of emit.LANES, so a product has the bits of the
kernels in products.py.

Wide rows are cut into chunks of columns. Between chunks the 16 partial sums of each product wait in memory, which costs
as much as 70 cycles of multiplications; behind the last one the register tile's are added up together.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import F32, F64, I32, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.processor import enabled
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers
from engine.cpu.kernels.terms import terms_of

TILE, WIDE_TILE = (2, 3), (6, 4)
"""Rows and tokens of the register tile. 2 x 3 sums of 16 lanes fill 12 of AVX2's 16 registers, 6 x 4 fill 24 of the 32
of AVX-512, and 6 rows and a token the others."""

CHUNK_BYTES = 2048 * 4
"""Bytes of activations of a chunk at most: 4 tokens fill a first-level cache of 32 KB, and the rest comes from the
second level in time. On a core of an EPYC 9004 whose multiplications alone run at 117 GFLOP/s, F16 rows of 2048 columns
times 128 tokens ran at 107 with it and at 103 with half as many."""

SECOND_LEVEL = 2
"""Cache level that tokens, and rows on their way from memory, are prefetched into: 105 GFLOP/s instead of 98 for
48 x 8192 times 512 tokens; into the first level it was 84."""

ROWS_BLOCK, TOKENS_BLOCK = 48, 60
"""Most rows of a tile, and the tokens whose partial sums are kept between chunks (180 KB): whole register tiles. Two
cores of an EPYC 9004 multiplied 8192 columns of F16 with 128 tokens at 207 GFLOP/s, with 96 rows and 48 tokens at
202."""

PARTIAL_BYTES = ROWS_BLOCK * TOKENS_BLOCK * LANES * 4
"""Bytes of the partial sums, in front of the tile in scratch."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"product": STEP}
"""Argument types of the kernel."""


def _least(builder: Any, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _ceil_div(builder: Any, a: Value, b: Value) -> Value:
    return builder.sdiv(builder.add(a, builder.sub(b, I64(1))), b)


def _clamped(builder: Any, group: Value, size: int, count: Value) -> list[Value]:
    """Indices group * size + 0..size-1, none above count - 1."""
    start, last = builder.mul(group, I64(size)), builder.sub(count, I64(1))
    return [_least(builder, builder.add(start, I64(i)), last) for i in range(size)]


@intrinsic(prefer_literal=True)
def product(typing_context, name, operands, low, high, scratch):
    """out[t, n] = scale * (sum over k of w[n, k] * x[t, k]) + bias[n] + residual[t, n], rows n = low..high-1.

    Operands: w_bytes, n_columns; x, x_bytes, n_tokens; out, out_bytes; scale; bias or 0; residual or 0,
    residual_bytes; w or 0. Rows of w, of the plain type in the name, are w_bytes apart; with 0 rows low..high-1 begin
    PARTIAL_BYTES behind scratch. All else is float32; at most ROWS_BLOCK rows; n_columns is a multiple of a step's.
    Tiles at the edge repeat their last row or token, which computes and stores the same value twice; residual and out
    do not overlap.
    """
    terms = terms_of(format_name(name))
    columns, type_size, step_x = terms.columns, terms.decoder.type_size, terms.columns * terms.prepared_bytes
    assert terms.decoder.block_size == columns, "longer blocks are dequantized first"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, scratch = arguments
        w_bytes, n_columns, x, x_bytes, n_tokens, out, out_bytes, *rest, w = integers(e, operands, 12)
        end = _Results(e, out, out_bytes, *rest)
        _, _, features = context.codegen().magic_tuple()
        rows_tile, tokens_tile = WIDE_TILE if "avx512f" in enabled(features) else TILE
        sums = [[cgutils.alloca_once(builder, vector(F32)) for _ in range(rows_tile)] for _ in range(tokens_tile)]
        n_rows, in_scratch = builder.sub(high, low), builder.icmp_signed("==", w, I64(0))
        w = builder.select(in_scratch, e.at(scratch, PARTIAL_BYTES), builder.add(w, builder.mul(low, w_bytes)))

        def blocks_of(total: Value, size: int) -> Any:
            return cgutils.for_range(builder, _ceil_div(builder, total, I64(size)))

        n_chunks = _ceil_div(builder, n_columns, I64(CHUNK_BYTES // terms.prepared_bytes))
        all_steps = builder.sdiv(n_columns, I64(columns))
        chunk_steps = _ceil_div(builder, all_steps, n_chunks)
        with blocks_of(n_tokens, TOKENS_BLOCK) as token_blocks, cgutils.for_range(builder, n_chunks) as chunks:
            first_token = builder.mul(token_blocks.index, I64(TOKENS_BLOCK))
            block_tokens = _least(builder, builder.sub(n_tokens, first_token), I64(TOKENS_BLOCK))
            step = builder.mul(chunks.index, chunk_steps)
            steps = _least(builder, builder.sub(all_steps, step), chunk_steps)
            chunk_w = builder.add(w, builder.mul(step, I64(type_size)))
            chunk_x = builder.add(x, builder.mul(first_token, x_bytes))
            chunk_x = builder.add(chunk_x, builder.mul(step, I64(step_x)))
            last = builder.icmp_signed("==", builder.add(step, steps), all_steps)
            # The first tokens' row tiles prefetch the next chunk's weights, or those of the rows behind the tile.
            next_tile = builder.sub(builder.mul(n_rows, w_bytes), builder.mul(step, I64(type_size)))
            next_w = builder.select(last, next_tile, builder.mul(steps, I64(type_size)))
            next_w = builder.select(builder.icmp_signed("==", token_blocks.index, I64(0)), next_w, I64(0))
            with blocks_of(block_tokens, tokens_tile) as token_tiles, blocks_of(n_rows, rows_tile) as row_tiles:
                tokens = _clamped(builder, token_tiles.index, tokens_tile, block_tokens)
                rows = _clamped(builder, row_tiles.index, rows_tile, n_rows)
                x_starts = [builder.add(chunk_x, builder.mul(token, x_bytes)) for token in tokens]
                w_starts = [builder.add(chunk_w, builder.mul(row, w_bytes)) for row in rows]
                n_row_tiles = _ceil_div(builder, n_rows, I64(rows_tile))
                tile = builder.add(builder.mul(token_tiles.index, n_row_tiles), row_tiles.index)
                kept = builder.add(scratch, builder.mul(tile, I64(4 * LANES * rows_tile * tokens_tile)))
                cells = [(at, 4 * LANES * number) for number, at in enumerate(at for each in sums for at in each)]
                # Each row tile prefetches one token behind the register tile's, beyond which loads would wait.
                ahead = builder.mul(builder.add(token_tiles.index, I64(1)), I64(tokens_tile))
                ahead = builder.add(chunk_x, builder.mul(builder.add(ahead, row_tiles.index), x_bytes))
                ahead_w = builder.select(builder.icmp_signed("==", token_tiles.index, I64(0)), next_w, I64(0))
                with builder.if_else(builder.icmp_signed("==", step, I64(0))) as (begin, go_on):
                    with begin:
                        for at, _ in cells:
                            builder.store(vector(F32)([0.0] * LANES), at)
                    with go_on:
                        for at, place in cells:
                            builder.store(e.load(kept, vector(F32), place, align=4), at)
                with cgutils.for_range(builder, steps) as inner:
                    offset = builder.mul(inner.index, I64(step_x))
                    w_offset = builder.mul(inner.index, I64(type_size))
                    places = [builder.add(start, w_offset) for start in w_starts]
                    ws = [step for place in places for step in terms.decoder.decode(e, place)]
                    for place in (builder.add(ahead, offset), *(builder.add(place, ahead_w) for place in places)):
                        e.prefetch(place, SECOND_LEVEL)
                    for start, of_token in zip(x_starts, sums, strict=True):
                        xs = terms.prepared(e, builder.add(start, offset))
                        for weights, at in zip(ws, of_token, strict=True):
                            builder.store(terms.add(e, builder.load(at), weights, xs), at)
                with builder.if_else(last) as (finish, keep):
                    with finish:
                        values = [[builder.load(at) for at in of_token] for of_token in sums]
                        places = [builder.add(first_token, token) for token in tokens]
                        end.store(values, places, [builder.add(low, row) for row in rows])
                    with keep:
                        for at, place in cells:
                            e.store(builder.load(at), kept, place)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


class _Results:
    """Where products go, and what is added to them."""

    def __init__(
        self,
        e: Emitter,
        out: Value,
        out_bytes: Value,
        scale: Value,
        bias: Value,
        residual: Value,
        residual_bytes: Value,
    ) -> None:
        b = e.builder
        self._e, self._out, self._out_bytes = e, out, out_bytes
        self._scale = b.fptrunc(b.bitcast(scale, F64), F32)
        self._bias, self._residual, self._residual_bytes = bias, residual, residual_bytes

    def store(self, values: list[list[Value]], tokens: list[Value], rows: list[Value]) -> None:
        """Adds up the lanes of each token's rows and writes them; the rows follow each other or repeat the last."""
        b, size = self._e.builder, len(rows)
        whole = b.icmp_signed("==", b.sub(rows[-1], rows[0]), I64(size - 1))
        totals = sum_rows(self._e, [value for of_token in values for value in of_token])
        for number, token in enumerate(tokens):
            of_token = _lanes(self._e, totals, range(size * number, size * number + size))
            with b.if_else(whole) as (at_once, one_by_one):
                with at_once:
                    self._write(of_token, token, rows[0])
                with one_by_one:
                    for lane, row in enumerate(rows):
                        self._write(b.extract_element(of_token, I32(lane)), token, row)

    def _write(self, value: Value, token: Value, row: Value) -> None:
        e, b = self._e, self._e.builder
        kind, at_row = value.type, b.mul(row, I64(4))
        value = e.multiply(value, e.splat(self._scale, kind.count) if isinstance(kind, ir.VectorType) else self._scale)
        beside = b.add(b.mul(token, self._residual_bytes), at_row)
        for base, offset in ((self._bias, at_row), (self._residual, beside)):
            kept = cgutils.alloca_once_value(b, value)
            with b.if_then(b.icmp_signed("!=", base, I64(0))):
                b.store(b.fadd(value, e.load(b.add(base, offset), kind, align=4)), kept)
            value = b.load(kept)
        e.store(value, b.add(b.add(self._out, b.mul(token, self._out_bytes)), at_row))


def sum_rows(e: Emitter, values: list[Value]) -> list[Value]:
    """The sums over the lanes of vectors, in order, side by side in vectors of 16; each has the bits of sum_lanes.

    Two vectors are halved together: first lanes of both, plus last lanes of both.
    """
    b, width = e.builder, LANES  # lanes that each of the values still has
    while width > 1:
        half = width // 2
        values = values if len(values) % 2 == 0 else [*values, values[-1]]
        joined = []
        for a, c in zip(values[::2], values[1::2], strict=True):
            low = [start + lane for start in range(0, 2 * LANES, width) for lane in range(half)]
            low_lanes, high_lanes = (
                b.shuffle_vector(a, c, ir.Constant(vector(I32), [lane + shift for lane in low])) for shift in (0, half)
            )
            joined.append(b.fadd(low_lanes, high_lanes))
        values, width = joined, half
    return values


def _lanes(e: Emitter, vectors: list[Value], lanes: range) -> Value:
    """Elements `lanes` of the vectors side by side, as one vector: taken from one of them, or from two neighbours."""
    index, start = divmod(lanes.start, LANES)
    if start + len(lanes) <= LANES:
        return e.part(vectors[index], start, len(lanes))
    numbers = [start + lane for lane in range(len(lanes))]
    return e.builder.shuffle_vector(vectors[index], vectors[index + 1], ir.Constant(vector(I32, len(lanes)), numbers))
