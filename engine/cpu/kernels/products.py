"""The loops around the block decoders: fused dot products and a row dequantizer.

Each emits one LLVM function body; products agree bit for bit because they sum in the order of emit.LANES.
Kernels take addresses as int64 and know nothing of arrays, threads or types beyond their decoder.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.typing import Signature
from numba.extending import intrinsic

from engine.cpu.kernels.emit import F32, F64, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.formats.decoders import DECODERS
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers
from engine.cpu.kernels.terms import Terms, terms_of

DOT_TOKENS = 4
"""Tokens that dot_tokens multiplies with each block it decodes."""

STREAM_COLUMNS, STREAM_AHEAD = 4096, 512
"""Rows of plain numbers (not of longer blocks) are read by dot_rows one after the other as long as x fits into the
first-level cache beside them, with so many bytes prefetched ahead: a core of an EPYC 9004 reads 27 to 31 GB/s of BF16
rows of 2048 columns this way and 19 with four rows side by side, but of 8192 columns 14 and 21."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {
    "dot_rows": STEP,
    "dot_tokens": STEP,
    "dequantize_rows": (types.int64,) * 6,
    "round_rows": (types.int64,) * 6,
}
"""Argument types of each kernel: addresses and lengths."""


def _least(builder: Any, a: Value, b: Value) -> Value:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _ceil_div(builder: Any, a: Value, b: int) -> Value:
    return builder.sdiv(builder.add(a, I64(b - 1)), I64(b))


def _signature(kind: str, literal: Any) -> Signature:
    return types.void(literal, *ARGUMENTS[kind])


def _clamped(builder: Any, low: Value, group: Value, size: int, high: Value) -> list[Value]:
    """Indices low + group * size + 0..size-1, none above high - 1."""
    start, last = builder.add(low, builder.mul(group, I64(size))), builder.sub(high, I64(1))
    return [_least(builder, builder.add(start, I64(i)), last) for i in range(size)]


def _generate_dots(terms: Terms, tokens_tile: int) -> Callable[[Any, Any, Any, Any], Value]:
    """Fused dequantize and dot: decodes a block in registers and adds it to the sums of tokens_tile tokens."""
    # Blocks of 256 fill the registers alone; short ones hide their latency behind those of other rows.
    block_size = terms.decoder.block_size
    rows_tile = 4 if block_size < 256 and tokens_tile == 1 else 1
    plain = block_size == terms.columns

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        o = _Operands(*integers(e, operands, 12))
        if not plain or rows_tile == 1:
            _dots(e, terms, o, (low, high), (rows_tile, tokens_tile), 0)
            return context.get_dummy_value()
        with builder.if_else(builder.icmp_signed("<=", o.n_blocks, I64(STREAM_COLUMNS // block_size))) as (short, long):
            with short:
                _dots(e, terms, o, (low, high), (1, tokens_tile), STREAM_AHEAD)
            with long:
                _dots(e, terms, o, (low, high), (rows_tile, tokens_tile), 0)
        return context.get_dummy_value()

    return generate


@dataclass(frozen=True)
class _Operands:
    """Of dot_rows and dot_tokens, in this order."""

    raw: Value
    row_bytes: Value
    n_blocks: Value
    x: Value
    x_bytes: Value
    n_tokens: Value
    out: Value
    out_bytes: Value
    scale: Value
    bias: Value
    residual: Value
    residual_bytes: Value


def _dots(e: Emitter, terms: Terms, o: _Operands, span: tuple[Value, Value], tile: tuple[int, int], ahead: int) -> None:
    """The loops over rows span[0]..span[1]-1, in tiles of rows and tokens, prefetching `ahead` bytes if not 0."""
    builder, decoder, (low, high), (rows_tile, tokens_tile) = e.builder, terms.decoder, span, tile
    scale = builder.fptrunc(builder.bitcast(o.scale, F64), F32)
    sums = [[cgutils.alloca_once(builder, vector(F32)) for _ in range(tokens_tile)] for _ in range(rows_tile)]
    zero = vector(F32)([0.0] * LANES)

    with (
        cgutils.for_range(builder, _ceil_div(builder, o.n_tokens, tokens_tile)) as token_groups,
        cgutils.for_range(builder, _ceil_div(builder, builder.sub(high, low), rows_tile)) as row_groups,
    ):
        # Groups at the end repeat their last token and row instead of running past them.
        token_ids = _clamped(builder, I64(0), token_groups.index, tokens_tile, o.n_tokens)
        rows = _clamped(builder, low, row_groups.index, rows_tile, high)
        token_starts = [builder.add(o.x, builder.mul(token, o.x_bytes)) for token in token_ids]
        row_starts = [builder.add(o.raw, builder.mul(row, o.row_bytes)) for row in rows]
        for total in chain.from_iterable(sums):
            builder.store(zero, total)
        with cgutils.for_range(builder, o.n_blocks) as blocks:
            offset = builder.mul(blocks.index, I64(decoder.type_size))
            column_bytes = builder.mul(blocks.index, I64(4 * decoder.block_size))
            columns = [builder.add(start, column_bytes) for start in token_starts]
            places = [builder.add(start, offset) for start in row_starts]
            if ahead:
                for place in places:
                    e.prefetch(e.at(place, ahead))
            decoded = [decoder.decode(e, place) for place in places]
            for step, weights in enumerate(zip(*decoded, strict=True)):
                xs = [terms.activations(e, column, 4 * terms.columns * step) for column in columns]
                for row_sums, w in zip(sums, weights, strict=True):
                    for total, values in zip(row_sums, xs, strict=True):
                        builder.store(terms.add(e, builder.load(total), w, values), total)
        for row, row_sums in zip(rows, sums, strict=True):
            at_row = builder.mul(row, I64(4))
            for token, total in zip(token_ids, row_sums, strict=True):
                value = e.multiply(e.sum_lanes(builder.load(total)), scale)
                value = _plus(e, value, o.bias, at_row)
                value = _plus(e, value, o.residual, builder.add(builder.mul(token, o.residual_bytes), at_row))
                e.store(value, builder.add(builder.add(o.out, builder.mul(token, o.out_bytes)), at_row))


def _plus(e: Emitter, value: Value, base: Value, offset: Value) -> Value:
    """Value plus the float at base + offset, or value where base is 0."""
    builder = e.builder
    result = cgutils.alloca_once_value(builder, value)
    with builder.if_then(builder.icmp_signed("!=", base, I64(0))):
        builder.store(builder.fadd(value, e.load(builder.add(base, offset), F32, align=4)), result)
    return builder.load(result)


@intrinsic(prefer_literal=True)
def dot_rows(typing_context, name, operands, low, high, scratch):
    """out[t, n] = scale * (sum over k of weight[n, k] * x[t, k]) + bias[n] + residual[t, n], rows n = low..high-1.

    Operands: raw, row_bytes, n_blocks of the packed rows; x, x_bytes, n_tokens; out, out_bytes; scale; bias or 0;
    residual or 0, residual_bytes. All float32; residual and out do not overlap. Decodes every row once per token.
    """
    return _signature("dot_rows", name), _generate_dots(terms_of(format_name(name)), 1)


@intrinsic(prefer_literal=True)
def dot_tokens(typing_context, name, operands, low, high, scratch):
    """As dot_rows, with every block decoded once for DOT_TOKENS tokens."""
    return _signature("dot_tokens", name), _generate_dots(terms_of(format_name(name)), DOT_TOKENS)


@intrinsic(prefer_literal=True)
def dequantize_rows(typing_context, name, raw, row_bytes, n_blocks, out, out_bytes, n_rows):
    """Writes n_rows rows of float32 weights, out_bytes apart."""
    decoder = DECODERS[format_name(name)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        _, raw, row_bytes, n_blocks, out, out_bytes, n_rows = arguments
        e = emitter(context, builder)
        with cgutils.for_range(builder, n_rows) as rows:
            source = builder.add(raw, builder.mul(rows.index, row_bytes))
            target = builder.add(out, builder.mul(rows.index, out_bytes))
            with cgutils.for_range(builder, n_blocks) as blocks:
                block = builder.add(source, builder.mul(blocks.index, I64(decoder.type_size)))
                columns = builder.add(target, builder.mul(blocks.index, I64(4 * decoder.block_size)))
                for step, weights in enumerate(decoder.decode(e, block)):
                    e.store(weights, columns, 4 * LANES * step)
        return context.get_dummy_value()

    return _signature("dequantize_rows", name), generate


@intrinsic(prefer_literal=True)
def round_rows(typing_context, name, x, x_bytes, n_blocks, out, out_bytes, n_rows):
    """Writes n_rows rows of activations, n_blocks steps each, as product of the same name reads them."""
    terms = terms_of(format_name(name))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        _, x, x_bytes, n_blocks, out, out_bytes, n_rows = arguments
        e = emitter(context, builder)
        with cgutils.for_range(builder, n_rows) as rows, cgutils.for_range(builder, n_blocks) as blocks:
            source = builder.add(x, builder.mul(rows.index, x_bytes))
            target = builder.add(out, builder.mul(rows.index, out_bytes))
            step = terms.activations(e, builder.add(source, builder.mul(blocks.index, I64(4 * terms.columns))))
            e.store(step, builder.add(target, builder.mul(blocks.index, I64(terms.prepared_bytes * terms.columns))))
        return context.get_dummy_value()

    return _signature("round_rows", name), generate
