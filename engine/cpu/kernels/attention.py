"""Attention of a few queries over a cache of keys and values that stays packed as float16 (or float32).

One pass per query and head: scores, softmax, weighted sum of values; cost linear in the number of keys. Each query is
computed alone and always in the same order, so its result has the same bits whatever else is in the batch.
Takes addresses and lengths; knows nothing of caches, slots or threads.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.config import PAGE
from engine.cpu.kernels.emit import F32, F64, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.formats import DECODERS
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"attend": STEP}
"""Argument types of the kernel."""

WIDE = 4
"""Vectors of a value head that are summed together."""


@intrinsic(prefer_literal=True)
def attend(typing_context, name, operands, low, high, scratch):
    """out[t, h] = sum over j of softmax(cap(scale * q[t, h] . keys[h // group, j]))_j * values[h // group, j].

    Computes the rows low..high-1 of the n_heads * n_tokens pairs (h, t), t running fastest. Query t sees the keys
    max(0, n_past + t + 1 - window) .. n_past + t. q is float32 (T, H, Hd) and out (T, H, Hv) without gaps; keys and
    values are (N, K, PAGE, width) without gaps; pages[i] (int64) has the positions from i * PAGE on; both widths are
    multiples of 16. The scratch holds the scores: n_past + n_tokens floats and 16 more.

    Operands: q, keys, values, out, pages, n_kv_heads, scale, n_tokens, n_heads, key_width, value_width, n_past, window,
    softcap, sinks, slopes.

    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0. Two float32 tables by head may be there, 0 = none:
    `sinks` holds a score that softmax counts beside the keys', `slopes` what a score loses per position between query
    and key (not together with a softcap).
    """
    decoder = DECODERS[format_name(name)]
    step = decoder.type_size

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, scores = arguments
        q, keys, values, out, pages, n_kv_heads, scale, *rest = integers(e, operands, 16)
        n_tokens, n_heads, key_width, value_width, n_past, window, softcap, sinks, slopes = rest
        group = builder.sdiv(n_heads, n_kv_heads)
        key_bytes, value_bytes = (
            builder.mul(builder.sdiv(width, I64(LANES)), I64(step)) for width in (key_width, value_width)
        )
        scale, softcap = (builder.fptrunc(builder.bitcast(bits, F64), F32) for bits in (scale, softcap))
        zero = vector(F32)([0.0] * LANES)
        total = cgutils.alloca_once(builder, vector(F32))
        largest = cgutils.alloca_once(builder, F32)
        sums = [cgutils.alloca_once(builder, vector(F32)) for _ in range(WIDE)]

        def offset(base: Value, index: Value, size: Value | int) -> Value:
            return builder.add(base, builder.mul(index, I64(size) if isinstance(size, int) else size))

        @contextmanager
        def each_position(cache: Value, head: Value, row_bytes: Value, begin: Value, end: Value) -> Iterator[Any]:
            """Walks over a head's rows at positions begin..end-1, page by page: (score's address, row's address)."""
            first, last = builder.sdiv(begin, I64(PAGE)), builder.sdiv(builder.add(end, I64(PAGE - 1)), I64(PAGE))
            head_bytes = builder.mul(row_bytes, I64(PAGE))
            with cgutils.for_range(builder, builder.sub(last, first)) as each:
                index = builder.add(first, each.index)
                page = e.load(offset(pages, index, 8), I64, align=8)
                start = builder.mul(index, I64(PAGE))
                low, high = larger(begin, start), smaller(end, builder.add(start, I64(PAGE)))
                place = builder.add(builder.mul(page, n_kv_heads), head)
                rows = offset(offset(cache, place, head_bytes), builder.sub(low, start), row_bytes)
                marks = offset(scores, builder.sub(low, begin), 4)
                with cgutils.for_range(builder, builder.sub(high, low)) as row:
                    yield offset(marks, row.index, 4), offset(rows, row.index, row_bytes)

        def larger(a: Value, b: Value) -> Value:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def smaller(a: Value, b: Value) -> Value:
            return builder.select(builder.icmp_signed("<", a, b), a, b)

        def weigh(part: Value, seen: Any, target: Value, vectors: int, inverse: Value) -> None:
            """Writes `vectors` vectors, from vector `part` on, of sum over j of scores[j] * values[j]."""
            for s in sums[:vectors]:
                builder.store(zero, s)
            with each_position(offset(values, part, step), seen[0], value_bytes, *seen[1:]) as (mark, row):
                share = e.splat(e.load(mark, F32, align=4))
                for i, s in enumerate(sums[:vectors]):
                    (value,) = decoder.decode(e, e.at(row, i * step))
                    builder.store(e.multiply_add(value, share, builder.load(s)), s)
            for i, s in enumerate(sums[:vectors]):
                e.store(e.multiply(builder.load(s), inverse), target, 4 * LANES * i)

        with cgutils.for_range(builder, builder.sub(high, low)) as rows:
            row = builder.add(low, rows.index)
            head, token = builder.sdiv(row, n_tokens), builder.srem(row, n_tokens)
            kv_head = builder.sdiv(head, group)
            end = builder.add(builder.add(n_past, token), I64(1))
            begin = larger(builder.sub(end, window), I64(0))
            n_keys = builder.sub(end, begin)
            place = builder.add(builder.mul(token, n_heads), head)
            query = offset(q, builder.mul(place, key_width), 4)
            target = offset(out, builder.mul(place, value_width), 4)

            sink, slope = (_of_head(e, table, head) for table in (sinks, slopes))
            has_sink = builder.icmp_signed("!=", sinks, I64(0))
            builder.store(ir.Constant(F32, float("-inf")), largest)
            with each_position(keys, kv_head, key_bytes, begin, end) as (mark, key):
                builder.store(zero, total)
                with cgutils.for_range(builder, builder.sdiv(key_width, I64(LANES))) as parts:
                    (part,) = decoder.decode(e, offset(key, parts.index, step))
                    xs = e.load(offset(query, parts.index, 4 * LANES), vector(F32), align=4)
                    builder.store(e.multiply_add(part, xs, builder.load(total)), total)
                score = e.multiply(e.sum_lanes(builder.load(total)), scale)
                index = builder.sdiv(builder.sub(mark, scores), I64(4))
                distance = builder.sub(builder.add(index, I64(1)), n_keys)  # 0 at the query itself
                score = builder.fadd(score, e.multiply(slope, builder.sitofp(distance, F32)))
                e.store(score, mark)
                builder.store(e.greater(score, builder.load(largest)), largest)

            with builder.if_then(builder.fcmp_ordered("!=", softcap, F32(0.0))):
                _cap(e, scores, n_keys, softcap)
                # Capping keeps the order, so the largest stays the largest.
                builder.store(_first(e, _capped(e, e.splat(builder.load(largest)), e.splat(softcap))), largest)
            top = builder.select(has_sink, e.greater(sink, builder.load(largest)), builder.load(largest))
            _softmax(e, scores, n_keys, top, total)
            sum_ = e.sum_lanes(builder.load(total))
            beside = _first(e, e.exp(e.splat(builder.fsub(sink, top))))
            sum_ = builder.select(has_sink, builder.fadd(sum_, beside), sum_)
            inverse = e.splat(builder.fdiv(F32(1.0), sum_))
            n_vectors = builder.sdiv(value_width, I64(LANES))
            wide_parts = builder.sdiv(n_vectors, I64(WIDE))
            with cgutils.for_range(builder, wide_parts) as parts:
                part = builder.mul(parts.index, I64(WIDE))
                weigh(part, (kv_head, begin, end), offset(target, part, 4 * LANES), WIDE, inverse)
            done = builder.mul(wide_parts, I64(WIDE))
            with cgutils.for_range(builder, builder.sub(n_vectors, done)) as parts:
                part = builder.add(done, parts.index)
                weigh(part, (kv_head, begin, end), offset(target, part, 4 * LANES), 1, inverse)
        return context.get_dummy_value()

    return types.void(name, *ARGUMENTS["attend"]), generate


def _of_head(e: Emitter, table: Value, head: Value) -> Value:
    """A head's entry of a float32 table, or 0 where there is no table."""
    builder = e.builder
    entry = cgutils.alloca_once_value(builder, F32(0.0))
    builder.store(F32(0.0), entry)
    with builder.if_then(builder.icmp_signed("!=", table, I64(0))):
        builder.store(e.load(builder.add(table, builder.mul(head, I64(4))), F32, align=4), entry)
    return builder.load(entry)


def _first(e: Emitter, values: Value) -> Value:
    return e.builder.extract_element(values, I64(0))


def _cap(e: Emitter, scores: Value, n_keys: Value, softcap: Value) -> None:
    """scores[j] = softcap * tanh(scores[j] / softcap) in place; what lies up to 15 floats behind is changed too."""
    builder = e.builder
    cap = e.splat(softcap)
    count = builder.sdiv(builder.add(n_keys, I64(LANES - 1)), I64(LANES))
    with cgutils.for_range(builder, count) as parts:
        place = builder.add(scores, builder.mul(parts.index, I64(4 * LANES)))
        e.store(_capped(e, e.load(place, vector(F32), align=4), cap), place)


def _capped(e: Emitter, x: Value, cap: Value) -> Value:
    """cap * tanh(x / cap), through exp(-2|x / cap|) so that nothing overflows."""
    builder = e.builder
    zero, one = e.const(x, 0.0), e.const(x, 1.0)
    ratio = builder.fdiv(x, cap)
    negative = builder.fcmp_ordered("<", ratio, zero)
    size = builder.select(negative, e.negate(ratio), ratio)
    small = e.exp(e.multiply(size, e.const(x, -2.0)))
    tanh = builder.fdiv(builder.fsub(one, small), builder.fadd(one, small))
    return e.multiply(cap, builder.select(negative, e.negate(tanh), tanh))


def _softmax(e: Emitter, scores: Value, n_keys: Value, largest: Value, total: Value) -> None:
    """scores[j] = exp(scores[j] - largest) in place; their lane sums go to `total`."""
    builder = e.builder
    top = e.splat(largest)
    builder.store(vector(F32)([0.0] * LANES), total)
    # The last vector reaches past the keys: those lanes are made -inf, so they add nothing that matters.
    padding = e.builder.add(scores, builder.mul(n_keys, I64(4)))
    e.store(vector(F32)([float("-inf")] * LANES), padding)
    count = builder.sdiv(builder.add(n_keys, I64(LANES - 1)), I64(LANES))
    with cgutils.for_range(builder, count) as parts:
        place = builder.add(scores, builder.mul(parts.index, I64(4 * LANES)))
        weights = e.exp(builder.fsub(e.load(place, vector(F32), align=4), top))
        e.store(weights, place)
        builder.store(builder.fadd(builder.load(total), weights), total)
