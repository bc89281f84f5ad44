"""Attention of a few queries over a cache of keys and values that stays packed as float16 (or float32).

The query heads that share a head of keys are computed together, so that the cache is read once for all of them; cost
is linear in the number of keys. A page holds keys column by column, which makes neighbouring positions the lanes of a
vector: scores need no sums across lanes. Values lie row by row. Scores, softmax, weighted sum of values: every number
is computed in the same order whatever other queries there are, so a query's result has the same bits in any batch.
Takes addresses and lengths; knows nothing of caches, slots or threads.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.config import PAGE
from engine.cpu.kernels.activations import quantize_blocks
from engine.cpu.kernels.emit import F32, F64, I16, I32, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.panels import GROUP
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"attend": STEP}
"""Argument types of the kernel."""

WIDTH = 8
"""Floats per vector: what AVX2 has, so that the sums below fill its registers and no more."""

HEADS, PARTS = 4, 2
"""Query heads and vectors of the cache that are multiplied together: 8 sums.

Converting float16 takes as long as multiplying: the more heads share it, the better.
"""

ALONE = 8
"""Vectors for each of the heads that are left."""

COLUMNS = 4
"""Columns of keys per round of the innermost loop; widths are multiples of it."""

LINE = 64
"""Bytes that one prefetch brings."""

FLOATS = vector(F32, WIDTH)


@dataclass(frozen=True)
class _Operands:
    """Of the kernel, in this order.

    q float32 (T, H, Hd) and out (T, H, Hv) without gaps; keys (N, K, Hd, PAGE) and values (N, K, PAGE, Hv) without
    gaps, both widths multiples of 16; pages: int64, pages[i] has the positions from i * PAGE on; scale: a float64;
    window: keys that a query sees; softcap: a float64, or 0; sinks and slopes: float32 (H,), or 0; activations: where
    out is written as well, quantized (activations.py), if the heads of an item are a multiple of 32 floats; else 0.
    """

    q: Value
    keys: Value
    values: Value
    out: Value
    pages: Value
    n_kv_heads: Value
    scale: Value
    n_tokens: Value
    n_heads: Value
    key_width: Value
    value_width: Value
    n_past: Value
    window: Value
    softcap: Value
    sinks: Value
    slopes: Value
    activations: Value


@intrinsic(prefer_literal=True)
def attend(typing_context, name, operands, low, high, scratch):
    """out[t, h] = sum over j of softmax(cap(scale * q[t, h] . keys[j, h // group]))_j * values[j, h // group].

    Items low..high-1 are pairs (head of keys, t), t running fastest: all query heads of that head. Query t sees the
    keys max(0, n_past + t + 1 - window) .. n_past + t. The scratch holds the scores: for each of `group` heads
    score_floats(n_past + n_tokens).

    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0. `sinks` holds a score of each head that softmax
    counts beside the keys', `slopes` what a score loses per position between query and key (not with a softcap).
    """
    half = format_name(name) == "F16"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, scores = arguments
        o = _Operands(*integers(e, operands, 17))
        with cgutils.for_range(builder, builder.sub(high, low)) as items:
            item = builder.add(low, items.index)
            _Item(e, o, item, scores, half).emit()
        return context.get_dummy_value()

    return types.void(name, *ARGUMENTS["attend"]), generate


class _Item:
    """One token and one head of keys, while its code is emitted."""

    def __init__(self, e: Emitter, o: _Operands, item: Value, scores: Value, half: bool) -> None:
        b = e.builder
        self.e, self.b, self.o, self.half = e, b, o, half
        self.size = 2 if half else 4
        self.group = b.sdiv(o.n_heads, o.n_kv_heads)
        self.key_bytes, self.value_bytes = (b.mul(width, I64(self.size)) for width in (o.key_width, o.value_width))
        self.kv_head, token = b.sdiv(item, o.n_tokens), b.srem(item, o.n_tokens)
        self.end = b.add(b.add(o.n_past, token), I64(1))
        begin = b.sub(self.end, o.window)
        self.begin = b.select(b.icmp_signed(">", begin, I64(0)), begin, I64(0))
        self.first = b.and_(self.begin, I64(-PAGE))
        self.n_scores = b.sub(self.end, self.first)
        place = b.add(b.mul(token, o.n_heads), b.mul(self.kv_head, self.group))
        self.kv_first = b.mul(self.kv_head, self.group)
        self.q = self.at(o.q, b.mul(place, o.key_width), 4)
        self.out = self.at(o.out, b.mul(place, o.value_width), 4)
        self.scores = scores
        # The same rule as score_floats() in attend.py.
        floats = b.add(b.and_(b.add(self.n_scores, I64(PAGE - 1)), I64(-PAGE)), I64(LANES))
        self.score_bytes = b.mul(floats, I64(4))

    def at(self, base: Value, index: Value, size: Value | int) -> Value:
        """The address base + index * size."""
        return self.b.add(base, self.b.mul(index, I64(size) if isinstance(size, int) else size))

    def emit(self) -> None:
        """Scores of all heads, softmax, weighted sums."""
        b, o = self.b, self.o
        with self._segments() as (page, low, high, done):
            start, ahead = self._page(o.keys, page, self.key_bytes)
            self._each(lambda heads: self._score(start, ahead, heads, low, high, done))
        with cgutils.for_range(b, self.group) as heads:
            self._soften(heads.index)
        with self._segments() as (page, low, high, done):
            start, ahead = self._page(o.values, page, self.value_bytes)
            self._each(lambda heads: self._weigh(start, ahead, heads, low, high, done))
        with cgutils.for_range(b, self.group) as heads:
            self._divide(heads.index)

        with b.if_then(b.icmp_signed("!=", o.activations, I64(0))):
            n_blocks = b.sdiv(b.mul(self.group, o.value_width), I64(GROUP))
            first = b.sdiv(b.sub(self.out, o.out), I64(4 * GROUP))
            quantize_blocks(self.e, o.out, o.activations, first, n_blocks)

    def _segments(self) -> Any:
        return _segments(self)

    def _page(self, cache: Value, index: Value, row_bytes: Value) -> tuple[Value, Value]:
        """Address of the head's part of the page at place `index`, and how far on that of the next page is.

        Pages lie anywhere, so the processor cannot know which lines come next.
        """
        b = self.b
        last = b.sdiv(b.sub(self.end, I64(1)), I64(PAGE))
        following = b.add(index, I64(1))
        following = b.select(b.icmp_signed("<", following, last), following, last)
        pages = (self.e.load(self.at(self.o.pages, place, 8), I64, align=8) for place in (index, following))
        here, there = (b.mul(b.add(b.mul(page, self.o.n_kv_heads), self.kv_head), I64(PAGE)) for page in pages)
        return self.at(cache, here, row_bytes), b.mul(b.sub(there, here), row_bytes)

    def _each(self, compute: Callable[[list[Value]], None]) -> None:
        """Emits `compute` for HEADS heads at a time, and again for each of those that are left."""
        b = self.b
        together = b.sdiv(self.group, I64(HEADS))
        with cgutils.for_range(b, together) as several:
            first = b.mul(several.index, I64(HEADS))
            compute([b.add(first, I64(i)) for i in range(HEADS)])
        done = b.mul(together, I64(HEADS))
        with cgutils.for_range(b, b.sub(self.group, done)) as alone:
            compute([b.add(done, alone.index)])

    def _load(self, address: Value, offset: int = 0) -> Value:
        """Eight numbers of the cache as float32."""
        if self.half:
            return self.e.half_to_float(self.e.load(address, vector(I16, WIDTH), offset))
        return self.e.load(address, FLOATS, offset, align=4)

    def _prefetch(self, share: Value, index: Value, n_bytes: int) -> None:
        """Asks for bytes index * n_bytes .. (index + 1) * n_bytes of what is read after this page.

        Each loop over a part of a page asks for as large a part of the next one, line after line: all at once would be
        more than a processor can wait for.
        """
        place = self.at(share, index, n_bytes)
        for offset in range(0, n_bytes, LINE):
            self.e.prefetch(self.e.at(place, offset))

    def _score(self, start: Value, ahead: Value, heads: list[Value], low: Value, high: Value, done: Value) -> None:
        """Scores of positions low..high-1 of a page, at place `done` + position; some around them are written, too."""
        e, b, o = self.e, self.b, self.o
        n_parts = PARTS if len(heads) == HEADS else ALONE
        wide = WIDTH * n_parts
        sums = [[cgutils.alloca_once(b, FLOATS) for _ in range(n_parts)] for _ in heads]
        queries = [self.at(self.q, b.mul(head, o.key_width), 4) for head in heads]
        targets = [self.at(b.add(self.scores, b.mul(head, self.score_bytes)), done, 4) for head in heads]
        scale = e.splat(b.fptrunc(b.bitcast(o.scale, F64), F32), WIDTH)
        first = b.sdiv(low, I64(wide))
        with cgutils.for_range(b, b.sub(b.sdiv(b.add(high, I64(wide - 1)), I64(wide)), first)) as chunks:
            place = b.mul(b.add(first, chunks.index), I64(wide))
            keys = self.at(start, place, self.size)
            share = b.add(b.add(start, ahead), b.mul(place, self.key_bytes))
            for total in chain.from_iterable(sums):
                b.store(ir.Constant(FLOATS, [0.0] * WIDTH), total)
            with cgutils.for_range(b, b.sdiv(o.key_width, I64(COLUMNS))) as several:
                columns = self.at(keys, several.index, self.size * PAGE * COLUMNS)
                at_query = b.mul(several.index, I64(4 * COLUMNS))
                self._prefetch(share, several.index, COLUMNS * self.size * wide)
                for column in range(COLUMNS):
                    ks = [self._load(columns, self.size * (PAGE * column + WIDTH * part)) for part in range(n_parts)]
                    for query, row in zip(queries, sums, strict=True):
                        x = e.splat(e.load(b.add(query, at_query), F32, 4 * column, align=4), WIDTH)
                        for k, total in zip(ks, row, strict=True):
                            b.store(e.multiply_add(k, x, b.load(total)), total)
            for target, row in zip(targets, sums, strict=True):
                for part, total in enumerate(row):
                    e.store(e.multiply(b.load(total), scale), self.at(target, place, 4), 4 * WIDTH * part)

    def _soften(self, head: Value) -> None:
        """Makes weights of a head's scores and clears its result; what their sum leaves to do lies behind them."""
        e, b, o = self.e, self.b, self.o
        scores = b.add(self.scores, b.mul(head, self.score_bytes))
        n_vectors = b.sdiv(b.add(self.n_scores, I64(LANES - 1)), I64(LANES))
        self._lean(head, scores, n_vectors)
        self._cap(scores, n_vectors)
        lowest = ir.Constant(vector(F32), [float("-inf")] * LANES)
        # The first vectors may lie before the keys, and the last reaches past them: those lanes add nothing.
        e.store(lowest, self.at(scores, self.n_scores, 4))
        before = b.sub(self.begin, self.first)
        with cgutils.for_range(b, b.sdiv(b.add(before, I64(LANES - 1)), I64(LANES))) as parts:
            place = self.at(scores, parts.index, 4 * LANES)
            left = e.splat(b.trunc(b.sub(before, b.mul(parts.index, I64(LANES))), I32))
            outside = b.icmp_signed("<", ir.Constant(vector(I32), list(range(LANES))), left)
            e.store(b.select(outside, lowest, e.load(place, vector(F32), align=4)), place)
        largest, total = (cgutils.alloca_once(b, vector(F32)) for _ in range(2))
        b.store(lowest, largest)
        with cgutils.for_range(b, n_vectors) as parts:
            value = e.load(self.at(scores, parts.index, 4 * LANES), vector(F32), align=4)
            b.store(e.greater(value, b.load(largest)), largest)
        top = b.load(largest)
        while top.type.count > 1:
            middle = top.type.count // 2
            top = e.greater(e.part(top, 0, middle), e.part(top, middle, middle))
        sink = self._of_head(o.sinks, head, float("-inf"))
        top = e.splat(e.greater(sink, b.extract_element(top, I32(0))))
        b.store(ir.Constant(vector(F32), [0.0] * LANES), total)
        with cgutils.for_range(b, n_vectors) as parts:
            place = self.at(scores, parts.index, 4 * LANES)
            weights = e.exp(b.fsub(e.load(place, vector(F32), align=4), top))
            e.store(weights, place)
            b.store(b.fadd(b.load(total), weights), total)
        sum_ = cgutils.alloca_once(b, F32)
        b.store(e.sum_lanes(b.load(total)), sum_)
        with b.if_then(b.icmp_signed("!=", o.sinks, I64(0))):
            beside = e.exp(b.fsub(e.splat(sink), top))
            b.store(b.fadd(b.load(sum_), b.extract_element(beside, I32(0))), sum_)
        e.store(b.fdiv(F32(1.0), b.load(sum_)), b.add(scores, self.score_bytes), -4)
        target = self.at(self.out, b.mul(head, o.value_width), 4)
        with cgutils.for_range(b, b.sdiv(o.value_width, I64(LANES))) as parts:
            e.store(ir.Constant(vector(F32), [0.0] * LANES), self.at(target, parts.index, 4 * LANES))

    def _divide(self, head: Value) -> None:
        """Divides a head's result by the sum of its weights."""
        e, b = self.e, self.b
        behind = b.add(self.scores, b.mul(b.add(head, I64(1)), self.score_bytes))
        inverse = e.splat(e.load(behind, F32, -4, align=4))
        target = self.at(self.out, b.mul(head, self.o.value_width), 4)
        with cgutils.for_range(b, b.sdiv(self.o.value_width, I64(LANES))) as parts:
            place = self.at(target, parts.index, 4 * LANES)
            e.store(e.multiply(e.load(place, vector(F32), align=4), inverse), place)

    def _of_head(self, table: Value, head: Value, without: float) -> Value:
        """A head's entry of a float32 table, or a number where there is no table."""
        b, place = self.b, self.b.add(self.kv_first, head)
        entry = cgutils.alloca_once(b, F32)
        b.store(F32(without), entry)
        with b.if_then(b.icmp_signed("!=", table, I64(0))):
            b.store(self.e.load(self.at(table, place, 4), F32, align=4), entry)
        return b.load(entry)

    def _lean(self, head: Value, scores: Value, n_vectors: Value) -> None:
        """Takes slope * distance from a head's scores where there are slopes."""
        e, b = self.e, self.b
        with b.if_then(b.icmp_signed("!=", self.o.slopes, I64(0))):
            slope = e.splat(self._of_head(self.o.slopes, head, 0.0))
            steps = ir.Constant(vector(I32), list(range(LANES)))
            with cgutils.for_range(b, n_vectors) as parts:
                # 0 at the query itself, negative before it.
                first = b.sub(b.add(b.mul(parts.index, I64(LANES)), I64(1)), self.n_scores)
                distance = b.sitofp(b.add(e.splat(b.trunc(first, I32)), steps), vector(F32))
                place = self.at(scores, parts.index, 4 * LANES)
                lean = e.multiply(slope, distance)
                e.store(b.fadd(e.load(place, vector(F32), align=4), lean), place)

    def _cap(self, scores: Value, n_vectors: Value) -> None:
        """Applies the softcap where there is one."""
        e, b = self.e, self.b
        cap = b.fptrunc(b.bitcast(self.o.softcap, F64), F32)
        with b.if_then(b.fcmp_ordered("!=", cap, F32(0.0))), cgutils.for_range(b, n_vectors) as parts:
            place = self.at(scores, parts.index, 4 * LANES)
            e.store(_capped(e, e.load(place, vector(F32), align=4), e.splat(cap)), place)

    def _weigh(self, start: Value, ahead: Value, heads: list[Value], low: Value, high: Value, done: Value) -> None:
        """Adds the values of positions low..high-1 of a page to the heads' results."""
        b, o = self.b, self.o
        weights = [self.at(b.add(self.scores, b.mul(head, self.score_bytes)), b.add(done, low), 4) for head in heads]
        targets = [self.at(self.out, b.mul(head, o.value_width), 4) for head in heads]
        rows, count = self.at(start, low, self.value_bytes), b.sub(high, low)
        column = I64(0)
        for n_parts in (PARTS,) if len(heads) == HEADS else (ALONE, PARTS):
            size = n_parts * WIDTH
            n_pieces = b.sdiv(b.sub(o.value_width, column), I64(size))
            with cgutils.for_range(b, n_pieces) as pieces:
                place = b.add(column, b.mul(pieces.index, I64(size)))
                self._weigh_columns(rows, ahead, weights, targets, count, place, n_parts)
            column = b.add(column, b.mul(n_pieces, I64(size)))

    def _weigh_columns(
        self,
        start: Value,
        ahead: Value,
        weights: list[Value],
        targets: list[Value],
        count: Value,
        column: Value,
        n_parts: int,
    ) -> None:
        e, b = self.e, self.b
        sums = [[cgutils.alloca_once(b, FLOATS) for _ in range(n_parts)] for _ in targets]
        places = [self.at(target, column, 4) for target in targets]
        first = self.at(start, column, self.size)
        share = b.add(b.add(start, ahead), b.mul(column, I64(self.size * PAGE)))
        for place, row in zip(places, sums, strict=True):
            for part, total in enumerate(row):
                b.store(e.load(place, FLOATS, 4 * WIDTH * part, align=4), total)
        with cgutils.for_range(b, count) as positions:
            value = self.at(first, positions.index, self.value_bytes)
            self._prefetch(share, positions.index, self.size * WIDTH * n_parts)
            vs = [self._load(value, self.size * WIDTH * part) for part in range(n_parts)]
            for weight, row in zip(weights, sums, strict=True):
                share = e.splat(e.load(self.at(weight, positions.index, 4), F32, align=4), WIDTH)
                for part, total in enumerate(row):
                    b.store(e.multiply_add(vs[part], share, b.load(total)), total)
        for place, row in zip(places, sums, strict=True):
            for part, total in enumerate(row):
                e.store(b.load(total), place, 4 * WIDTH * part)


class _segments:
    """A loop over the runs of neighbouring positions that an item sees, page by page.

    Gives: the page's place in the table, its first and last position + 1 that are seen, and the place of its scores.
    """

    def __init__(self, item: _Item) -> None:
        b = item.b
        self._item = item
        self._first_page = b.sdiv(item.begin, I64(PAGE))
        last_page = b.sdiv(b.sub(item.end, I64(1)), I64(PAGE))
        self._loop = cgutils.for_range(b, b.add(b.sub(last_page, self._first_page), I64(1)))

    def __enter__(self) -> tuple[Value, Value, Value, Value]:
        item, b = self._item, self._item.b
        page = b.add(self._first_page, self._loop.__enter__().index)
        start = b.mul(page, I64(PAGE))
        begin = b.select(b.icmp_signed(">", item.begin, start), item.begin, start)
        end = b.add(start, I64(PAGE))
        end = b.select(b.icmp_signed("<", item.end, end), item.end, end)
        return page, b.sub(begin, start), b.sub(end, start), b.sub(start, item.first)

    def __exit__(self, *error: object) -> None:
        self._loop.__exit__(*error)


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
