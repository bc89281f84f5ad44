"""Attention of a few queries over a cache of keys and values that stays packed as float16 (or float32).

The query heads that share a head of keys are computed together, so that the cache is read once for all of them; cost
is linear in the number of keys. A page holds keys column by column, which makes neighbouring positions the lanes of a
vector: scores need no sums across lanes. Values are stored row by row. Pages are taken one by one, keys and then
values, with a softmax that is corrected when a page has a larger score; while one is in use, the next is prefetched.
Every number is computed in the same order for any other queries beside it, so a query's result has the same bits in
any batch. Takes addresses and lengths; knows nothing of caches, slots or threads.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

HEADS, PARTS = 4, 3
"""Query heads and vectors of the cache that are multiplied together: 12 sums, and the 4 registers left are in use, too.

Converting float16 takes as long as multiplying: the more heads share it, the better. Eight sums would just cover the
latency of a multiplication; what is over makes up for every other delay. Where three vectors are too many, it is two.
"""

ALONE = 8
"""Vectors for each of the heads that are left."""

assert ALONE * WIDTH == PAGE, "the rounds of _Item._score are the vectors of one page"

HEAD_FLOATS = PAGE + 2 * LANES
"""Floats of scratch per query head: scores of a page, then partial sums of weights and two numbers of the softmax."""

SUMS, LARGEST, CORRECTION = (4 * PAGE, 4 * (PAGE + WIDTH), 4 * (PAGE + WIDTH + 1))
"""Bytes before these: partial sums, the largest score so far times log2(e), the factor on what was added up before."""

LOG2_E = 1.4426950408889634

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
    keys max(0, n_past + t + 1 - window) .. n_past + t. The scratch has HEAD_FLOATS for each of the H heads and is
    aligned to 64 bytes.

    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0. `sinks` holds a score of each head that softmax
    counts beside the keys', `slopes` is subtracted per position between query and key (not with a softcap).
    """
    half = format_name(name) == "F16"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, scratch = arguments
        o = _Operands(*integers(e, operands, 17))
        n_items = builder.sub(high, low)
        # All heads of one token go through a page together: that is the order of the cache in memory.
        alone = builder.icmp_signed("==", o.n_tokens, I64(1))
        n_rounds, together = (builder.select(alone, *pair) for pair in ((I64(1), n_items), (n_items, I64(1))))
        with cgutils.for_range(builder, n_rounds) as rounds:
            _Item(e, o, builder.add(low, rounds.index), together, scratch, half).emit()
        return context.get_dummy_value()

    return types.void(name, *ARGUMENTS["attend"]), generate


class _Item:
    """One token and neighbouring heads of keys, while their code is emitted."""

    def __init__(self, e: Emitter, o: _Operands, item: Value, n_kv_heads: Value, scratch: Value, half: bool) -> None:
        b = e.builder
        self.e, self.b, self.o, self.half = e, b, o, half
        self.size = 2 if half else 4
        self.group = b.sdiv(o.n_heads, o.n_kv_heads)
        self.key_bytes, self.value_bytes = (b.mul(width, I64(self.size)) for width in (o.key_width, o.value_width))
        self.first_kv_head, self.token = b.sdiv(item, o.n_tokens), b.srem(item, o.n_tokens)
        self.n_kv_heads, self.scratches = n_kv_heads, scratch
        self.end = b.add(b.add(o.n_past, self.token), I64(1))
        begin = b.sub(self.end, o.window)
        self.begin = b.select(b.icmp_signed(">", begin, I64(0)), begin, I64(0))
        self.cap = b.fptrunc(b.bitcast(o.softcap, F64), F32)
        scale = b.bitcast(o.scale, F64)
        self.scale = b.fptrunc(scale, F32)
        # Weights are powers of two, scores multiplied by log2(e): at once by that and by the scale, unless something
        # comes between.
        self.plain = b.and_(b.icmp_signed("==", o.slopes, I64(0)), b.fcmp_ordered("==", self.cap, F32(0.0)))
        at_once = b.fptrunc(b.fmul(scale, F64(LOG2_E)), F32)
        self.factor = b.select(self.plain, at_once, b.fptrunc(F64(LOG2_E), F32))

    def at(self, base: Value, index: Value, size: Value | int) -> Value:
        """The address base + index * size."""
        return self.b.add(base, self.b.mul(index, I64(size) if isinstance(size, int) else size))

    def head_scratch(self, head: Value) -> Value:
        """The scratch of a query head."""
        return self.at(self.scratch, head, 4 * HEAD_FLOATS)

    def emit(self) -> None:
        """Scores, softmax and weighted sums of all heads, page by page."""
        b, o = self.b, self.o
        with self._kv_heads(), cgutils.for_range(b, self.group) as heads:
            self._begin(heads.index)
        with _segments(self) as (page, low, high):
            keys, values, next_keys = self._page(page)
            with self._kv_heads() as index:
                these_keys = self.at(keys, index, b.mul(self.key_bytes, I64(PAGE)))
                these_values = self.at(values, index, b.mul(self.value_bytes, I64(PAGE)))
                following = b.add(index, I64(1))
                more = b.icmp_signed("<", following, self.n_kv_heads)
                ahead = b.select(more, self.at(these_keys, I64(PAGE), self.key_bytes), next_keys)
                self._each(lambda heads: self._score(these_keys, these_values, heads, low, high))
                self._each(lambda heads: self._soften(heads, page, low, high))
                self._each(lambda heads: self._weigh(these_values, ahead, heads, low, high))
        with self._kv_heads():
            with cgutils.for_range(b, self.group) as heads:
                self._divide(heads.index)
            with b.if_then(b.icmp_signed("!=", o.activations, I64(0))):
                n_blocks = b.sdiv(b.mul(self.group, o.value_width), I64(GROUP))
                first = b.sdiv(b.sub(self.out, o.out), I64(4 * GROUP))
                quantize_blocks(self.e, o.out, o.activations, first, n_blocks)

    @contextmanager
    def _kv_heads(self) -> Iterator[Value]:
        """A loop over the heads of keys; gives the number of the head that the queries and results belong to."""
        b, o = self.b, self.o
        with cgutils.for_range(b, self.n_kv_heads) as heads:
            self.first_head = b.mul(b.add(self.first_kv_head, heads.index), self.group)
            place = b.add(b.mul(self.token, o.n_heads), self.first_head)
            self.q = self.at(o.q, b.mul(place, o.key_width), 4)
            self.out = self.at(o.out, b.mul(place, o.value_width), 4)
            self.scratch = self.at(self.scratches, b.mul(heads.index, self.group), 4 * HEAD_FLOATS)
            yield heads.index

    def _page(self, index: Value) -> tuple[Value, Value, Value]:
        """Addresses of the first head's keys and values of the page at place `index`, and of the next page's keys.

        Pages may be anywhere in memory, so the processor cannot predict which lines come next.
        """
        b, o = self.b, self.o
        last = b.sdiv(b.sub(self.end, I64(1)), I64(PAGE))
        following = b.add(index, I64(1))
        following = b.select(b.icmp_signed("<", following, last), following, last)
        pages = (self.e.load(self.at(o.pages, place, 8), I64, align=8) for place in (index, following))
        heads = [b.add(b.mul(page, o.n_kv_heads), self.first_kv_head) for page in pages]
        here, there = (b.mul(head, I64(PAGE)) for head in heads)
        keys, next_keys = (self.at(o.keys, row, self.key_bytes) for row in (here, there))
        return keys, self.at(o.values, here, self.value_bytes), next_keys

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
        """Prefetches bytes index * n_bytes .. (index + 1) * n_bytes of what is read after this.

        Each loop over a part of a page prefetches as large a part of what follows, line after line: a processor cannot
        have all of them in flight at once.
        """
        place = self.at(share, index, n_bytes)
        for offset in range(0, n_bytes, LINE):
            self.e.prefetch(self.e.at(place, offset))

    def _begin(self, head: Value) -> None:
        """Clears a head's result and the sums of its weights."""
        e, b = self.e, self.b
        zeros, scratch = ir.Constant(FLOATS, [0.0] * WIDTH), self.head_scratch(head)
        target = self.at(self.out, b.mul(head, self.o.value_width), 4)
        with cgutils.for_range(b, b.sdiv(self.o.value_width, I64(WIDTH))) as parts:
            e.store(zeros, self.at(target, parts.index, 4 * WIDTH))
        e.store(zeros, scratch, SUMS)
        e.store(F32(float("-inf")), scratch, LARGEST)
        with b.if_then(b.icmp_signed("!=", self.o.sinks, I64(0))):
            e.store(F32(1.0), scratch, SUMS)
            e.store(b.fmul(self._of_head(self.o.sinks, head), F32(LOG2_E)), scratch, LARGEST)

    def _score(self, keys: Value, ahead: Value, heads: list[Value], low: Value, high: Value) -> None:
        """Products of queries with the keys low..high-1 of a page, and with some around them."""
        b = self.b
        # Place of the first vector, vectors together, and how often.
        rounds = ((0, 3, 2), (6, 2, 1)) if len(heads) == HEADS else ((0, ALONE, 1),)
        for first, n_parts, count in rounds:
            with cgutils.for_range(b, I64(count)) as chunks:
                place = b.add(I64(WIDTH * first), b.mul(chunks.index, I64(WIDTH * n_parts)))
                seen = b.icmp_signed("<", place, high)
                seen = b.and_(seen, b.icmp_signed(">", b.add(place, I64(WIDTH * n_parts)), low))
                with b.if_then(seen):
                    self._score_columns(keys, ahead, heads, place, n_parts)

    def _score_columns(self, keys: Value, ahead: Value, heads: list[Value], place: Value, n_parts: int) -> None:
        e, b, o = self.e, self.b, self.o
        sums = [[cgutils.alloca_once(b, FLOATS) for _ in range(n_parts)] for _ in heads]
        queries = [self.at(self.q, b.mul(head, o.key_width), 4) for head in heads]
        keys = self.at(keys, place, self.size)
        share = b.add(ahead, b.mul(place, self.value_bytes))
        for total in chain.from_iterable(sums):
            b.store(ir.Constant(FLOATS, [0.0] * WIDTH), total)
        with cgutils.for_range(b, b.sdiv(o.key_width, I64(COLUMNS))) as several:
            columns = self.at(keys, several.index, self.size * PAGE * COLUMNS)
            at_query = b.mul(several.index, I64(4 * COLUMNS))
            self._prefetch(share, several.index, COLUMNS * self.size * WIDTH * n_parts)
            for column in range(COLUMNS):
                ks = [self._load(columns, self.size * (PAGE * column + WIDTH * part)) for part in range(n_parts)]
                for query, row in zip(queries, sums, strict=True):
                    x = e.splat(e.load(b.add(query, at_query), F32, 4 * column, align=4), WIDTH)
                    for k, total in zip(ks, row, strict=True):
                        b.store(e.multiply_add(k, x, b.load(total)), total)
        for head, row in zip(heads, sums, strict=True):
            target = self.at(self.head_scratch(head), place, 4)
            for part, total in enumerate(row):
                e.store(b.load(total), target, 4 * WIDTH * part)

    def _soften(self, heads: list[Value], page: Value, low: Value, high: Value) -> None:
        """Makes weights of the heads' products with a page, adds them up, and corrects the sums before.

        First all scores and what is the largest, which takes many steps that wait for one another, then all weights.
        """
        e, b = self.e, self.b
        scratches = [self.head_scratch(head) for head in heads]
        with b.if_then(b.not_(self.plain)):
            for head, scratch in zip(heads, scratches, strict=True):
                self._change(head, scratch, page)
        with b.if_then(b.icmp_signed("<", b.sub(high, low), I64(PAGE))):
            for scratch in scratches:
                self._leave_out(scratch, low, high)
        factor = e.splat(self.factor, WIDTH)
        parts = range(0, 4 * PAGE, 4 * WIDTH)
        tops = []
        for scratch in scratches:
            scores = [e.multiply(e.load(scratch, FLOATS, part, align=4), factor) for part in parts]
            for part, score in zip(parts, scores, strict=True):
                e.store(score, scratch, part)
            tops.append(self._largest([*scores, e.splat(e.load(scratch, F32, LARGEST, align=4), WIDTH)]))
        for scratch, top in zip(scratches, tops, strict=True):
            correction = e.power_of_two(b.fsub(e.splat(e.load(scratch, F32, LARGEST, align=4), WIDTH), top))
            total = e.multiply(e.load(scratch, FLOATS, SUMS, align=4), correction)
            for part in parts:
                weight = e.power_of_two(b.fsub(e.load(scratch, FLOATS, part, align=4), top))
                e.store(weight, scratch, part)
                total = b.fadd(total, weight)
            e.store(total, scratch, SUMS)
            e.store(b.extract_element(top, I32(0)), scratch, LARGEST)
            e.store(b.extract_element(correction, I32(0)), scratch, CORRECTION)

    def _largest(self, vectors: list[Value]) -> Value:
        """The largest number in all lanes."""
        e, b = self.e, self.b
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=False)
            vectors = [*(e.greater(x, y) for x, y in pairs), *vectors[len(vectors) & ~1 :]]
        top = vectors[0]
        for distance in (4, 2, 1):
            lanes = ir.Constant(vector(I32, WIDTH), [lane ^ distance for lane in range(WIDTH)])
            top = e.greater(top, b.shuffle_vector(top, ir.Constant(FLOATS, ir.Undefined), lanes))
        return top

    def _leave_out(self, scratch: Value, low: Value, high: Value) -> None:
        """Gives the places around low..high-1 the lowest score: what was computed there may be anything."""
        e, b = self.e, self.b
        lowest = ir.Constant(FLOATS, [float("-inf")] * WIDTH)
        first, last = (e.splat(b.trunc(bound, I32), WIDTH) for bound in (low, high))
        for place in range(0, PAGE, WIDTH):
            lanes = ir.Constant(vector(I32, WIDTH), list(range(place, place + WIDTH)))
            inside = b.and_(b.icmp_signed(">=", lanes, first), b.icmp_signed("<", lanes, last))
            e.store(b.select(inside, e.load(scratch, FLOATS, 4 * place, align=4), lowest), scratch, 4 * place)

    def _change(self, head: Value, scratch: Value, page: Value) -> None:
        """Makes scores of products where there is more to do than scaling: a softcap or slopes."""
        e, b = self.e, self.b
        capped = b.fcmp_ordered("!=", self.cap, F32(0.0))
        slope = e.splat(self._of_head(self.o.slopes, head))
        steps = ir.Constant(vector(I32), list(range(LANES)))
        with cgutils.for_range(b, I64(PAGE // LANES)) as parts:
            place = self.at(scratch, parts.index, 4 * LANES)
            score = e.multiply(e.load(place, vector(F32), align=4), e.splat(self.scale))
            e.store(score, place)
            with b.if_then(capped):
                e.store(_capped(e, score, e.splat(self.cap)), place)
            with b.if_then(b.icmp_signed("!=", self.o.slopes, I64(0))):
                # 0 at the query itself, negative before it.
                first = b.add(b.mul(page, I64(PAGE)), b.mul(parts.index, I64(LANES)))
                first = b.sub(b.add(first, I64(1)), self.end)
                distance = b.sitofp(b.add(e.splat(b.trunc(first, I32)), steps), vector(F32))
                e.store(b.fadd(score, e.multiply(slope, distance)), place)

    def _divide(self, head: Value) -> None:
        """Divides a head's result by the sum of its weights."""
        e, b = self.e, self.b
        total = e.sum_lanes(e.load(self.head_scratch(head), FLOATS, SUMS, align=4))
        inverse = e.splat(b.fdiv(F32(1.0), total))
        target = self.at(self.out, b.mul(head, self.o.value_width), 4)
        with cgutils.for_range(b, b.sdiv(self.o.value_width, I64(LANES))) as parts:
            place = self.at(target, parts.index, 4 * LANES)
            e.store(e.multiply(e.load(place, vector(F32), align=4), inverse), place)

    def _of_head(self, table: Value, head: Value) -> Value:
        """A head's entry of a float32 table, 0 where there is no table."""
        b, place = self.b, self.b.add(self.first_head, head)
        entry = cgutils.alloca_once(b, F32)
        b.store(F32(0.0), entry)
        with b.if_then(b.icmp_signed("!=", table, I64(0))):
            b.store(self.e.load(self.at(table, place, 4), F32, align=4), entry)
        return b.load(entry)

    def _weigh(self, values: Value, ahead: Value, heads: list[Value], low: Value, high: Value) -> None:
        """Corrects the heads' results and adds the values low..high-1 of a page."""
        b, o = self.b, self.o
        n_vectors, done = b.sdiv(o.value_width, I64(WIDTH)), I64(0)
        if len(heads) == HEADS:
            # Threes and at most two twos.
            twos = b.srem(b.mul(n_vectors, I64(2)), I64(PARTS))
            plan = ((PARTS, b.sdiv(b.sub(n_vectors, b.mul(twos, I64(2))), I64(PARTS))), (2, twos))
        else:
            plan = ((ALONE, b.sdiv(n_vectors, I64(ALONE))), (2, b.sdiv(b.srem(n_vectors, I64(ALONE)), I64(2))))
        for n_parts, count in plan:
            with cgutils.for_range(b, count) as pieces:
                column = b.mul(b.add(done, b.mul(pieces.index, I64(n_parts))), I64(WIDTH))
                self._weigh_columns(values, ahead, heads, low, high, column, n_parts)
            done = b.add(done, b.mul(count, I64(n_parts)))

    def _weigh_columns(
        self, values: Value, ahead: Value, heads: list[Value], low: Value, high: Value, column: Value, n_parts: int
    ) -> None:
        e, b = self.e, self.b
        sums = [[cgutils.alloca_once(b, FLOATS) for _ in range(n_parts)] for _ in heads]
        places = [self.at(self.at(self.out, b.mul(head, self.o.value_width), 4), column, 4) for head in heads]
        scratches = [self.head_scratch(head) for head in heads]
        for scratch, place, row in zip(scratches, places, sums, strict=True):
            correction = e.splat(e.load(scratch, F32, CORRECTION, align=4), WIDTH)
            for part, total in enumerate(row):
                b.store(e.multiply(e.load(place, FLOATS, 4 * WIDTH * part, align=4), correction), total)
        weights = [self.at(scratch, low, 4) for scratch in scratches]
        first = self.at(self.at(values, low, self.value_bytes), column, self.size)
        share = b.add(ahead, b.mul(column, I64(self.size * PAGE)))
        with cgutils.for_range(b, b.sub(high, low)) as positions:
            value = self.at(first, positions.index, self.value_bytes)
            self._prefetch(share, positions.index, self.size * WIDTH * n_parts)
            vs = [self._load(value, self.size * WIDTH * part) for part in range(n_parts)]
            for weight, row in zip(weights, sums, strict=True):
                x = e.splat(e.load(self.at(weight, positions.index, 4), F32, align=4), WIDTH)
                for v, total in zip(vs, row, strict=True):
                    b.store(e.multiply_add(v, x, b.load(total)), total)
        for place, row in zip(places, sums, strict=True):
            for part, total in enumerate(row):
                e.store(b.load(total), place, 4 * WIDTH * part)


class _segments:
    """A loop over the runs of neighbouring positions that an item sees, page by page.

    Gives: the page's place in the table, its first and last position + 1 that are seen.
    """

    def __init__(self, item: _Item) -> None:
        b = item.b
        self._item = item
        self._first_page = b.sdiv(item.begin, I64(PAGE))
        last_page = b.sdiv(b.sub(item.end, I64(1)), I64(PAGE))
        self._loop = cgutils.for_range(b, b.add(b.sub(last_page, self._first_page), I64(1)))

    def __enter__(self) -> tuple[Value, Value, Value]:
        item, b = self._item, self._item.b
        page = b.add(self._first_page, self._loop.__enter__().index)
        start = b.mul(page, I64(PAGE))
        begin = b.select(b.icmp_signed(">", item.begin, start), item.begin, start)
        end = b.add(start, I64(PAGE))
        end = b.select(b.icmp_signed("<", item.end, end), item.end, end)
        return page, b.sub(begin, start), b.sub(end, start)

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
