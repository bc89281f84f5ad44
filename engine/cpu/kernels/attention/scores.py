"""Emits scores of queries with the keys of a page, and makes weights of them: the softmax, corrected page by page."""

from itertools import chain

from llvmlite import ir
from numba.core import cgutils

from engine.config import KV_BLOCK, PAGE
from engine.cpu.kernels.attention.item import COLUMNS, CORRECTION, LARGEST, SUMS, Item
from engine.cpu.kernels.emit import F32, I32, I64, LANES, Emitter, Value, vector


def score_page(item: Item, keys: Value, ahead: Value, heads: list[Value], low: Value, high: Value) -> None:
    """Products of queries with the keys low..high-1 of a page, and with some around them."""
    b = item.b
    done = I64(0)
    for n_parts, count in item.registers.pieces(len(heads), I64(PAGE // item.width), b):
        with cgutils.for_range(b, count) as chunks:
            place = b.mul(b.add(done, b.mul(chunks.index, I64(n_parts))), I64(item.width))
            seen = b.icmp_signed("<", place, high)
            seen = b.and_(seen, b.icmp_signed(">", b.add(place, I64(item.width * n_parts)), low))
            with b.if_then(seen):
                _score_columns(item, keys, ahead, heads, place, n_parts)
        done = b.add(done, b.mul(count, I64(n_parts)))


def _score_columns(item: Item, keys: Value, ahead: Value, heads: list[Value], place: Value, n_parts: int) -> None:
    e, b, o = item.e, item.b, item.o
    sums = [[cgutils.alloca_once(b, item.floats) for _ in range(n_parts)] for _ in heads]
    queries = [item.at(item.q, b.mul(head, o.key_width), 4) for head in heads]
    first = item.at(keys, place, item.size)
    share = b.add(ahead, b.mul(place, item.value_bytes))

    def add_columns(begin: Value, count: Value) -> None:
        """Products of so many times COLUMNS columns."""
        for total in chain.from_iterable(sums):
            b.store(ir.Constant(item.floats, [0.0] * item.width), total)
        with cgutils.for_range(b, count) as several:
            index = b.add(begin, several.index)
            item.prefetch(share, index, COLUMNS * item.size * item.width * n_parts)
            _add_products(item, item.at(first, index, item.size * PAGE * COLUMNS), index, queries, sums)

    if not item.scaled:
        add_columns(I64(0), b.sdiv(o.key_width, I64(COLUMNS)))
        totals = sums
    else:
        totals = [[cgutils.alloca_once(b, item.floats) for _ in range(n_parts)] for _ in heads]
        for total in chain.from_iterable(totals):
            b.store(ir.Constant(item.floats, [0.0] * item.width), total)
        per_block = I64(KV_BLOCK // COLUMNS)
        with cgutils.for_range(b, b.sdiv(o.key_width, I64(KV_BLOCK))) as blocks:
            add_columns(b.mul(blocks.index, per_block), per_block)
            item.prefetch(item.scales(ahead, o.value_width, blocks.index), I64(0), 2 * PAGE)
            scales = item.at(item.scales(keys, o.key_width, blocks.index), place, 2)
            for part in range(n_parts):
                scale = item.load_scales(scales, part)
                for row, whole in zip(sums, totals, strict=True):
                    b.store(e.multiply_add(b.load(row[part]), scale, b.load(whole[part])), whole[part])
    for head, row in zip(heads, totals, strict=True):
        target = item.at(item.head_scratch(head), place, 4)
        for part, total in enumerate(row):
            e.store(b.load(total), target, 4 * item.width * part)


def _add_products(item: Item, columns: Value, index: Value, queries: list[Value], sums: list[list[Value]]) -> None:
    """Adds the products of COLUMNS columns of keys, in that place, from number index * COLUMNS on."""
    e, b = item.e, item.b
    at_query = b.mul(index, I64(4 * COLUMNS))
    for column in range(COLUMNS):
        ks = [item.load(columns, item.size * (PAGE * column + item.width * part)) for part in range(len(sums[0]))]
        for query, row in zip(queries, sums, strict=True):
            x = e.splat(e.load(b.add(query, at_query), F32, 4 * column, align=4), item.width)
            for k, total in zip(ks, row, strict=True):
                b.store(e.multiply_add(k, x, b.load(total)), total)


def soften_page(item: Item, heads: list[Value], page: Value, low: Value, high: Value) -> None:
    """Makes weights of the heads' products with a page, adds them up, and corrects the sums before.

    First all scores and what is the largest, which takes many steps that wait for one another, then all weights.
    """
    e, b = item.e, item.b
    scratches = [item.head_scratch(head) for head in heads]
    with b.if_then(b.not_(item.plain)):
        for head, scratch in zip(heads, scratches, strict=True):
            _change(item, head, scratch, page)
    with b.if_then(b.icmp_signed("<", b.sub(high, low), I64(PAGE))):
        for scratch in scratches:
            _leave_out(item, scratch, low, high)
    factor = e.splat(item.factor, item.width)
    parts = range(0, 4 * PAGE, 4 * item.width)
    tops = []
    for scratch in scratches:
        scores = [e.multiply(e.load(scratch, item.floats, part, align=4), factor) for part in parts]
        for part, score in zip(parts, scores, strict=True):
            e.store(score, scratch, part)
        tops.append(_largest(item, [*scores, e.splat(e.load(scratch, F32, LARGEST, align=4), item.width)]))
    for scratch, top in zip(scratches, tops, strict=True):
        correction = e.power_of_two(b.fsub(e.splat(e.load(scratch, F32, LARGEST, align=4), item.width), top))
        total = e.multiply(e.load(scratch, item.floats, SUMS, align=4), correction)
        for part in parts:
            weight = e.power_of_two(b.fsub(e.load(scratch, item.floats, part, align=4), top))
            e.store(weight, scratch, part)
            total = b.fadd(total, weight)
        e.store(total, scratch, SUMS)
        e.store(b.extract_element(top, I32(0)), scratch, LARGEST)
        e.store(b.extract_element(correction, I32(0)), scratch, CORRECTION)


def _largest(item: Item, vectors: list[Value]) -> Value:
    """The largest number in all lanes."""
    e, b = item.e, item.b
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=False)
        vectors = [*(e.greater(x, y) for x, y in pairs), *vectors[len(vectors) & ~1 :]]
    top = vectors[0]
    for distance in (1 << bit for bit in reversed(range(item.width.bit_length() - 1))):
        lanes = ir.Constant(vector(I32, item.width), [lane ^ distance for lane in range(item.width)])
        top = e.greater(top, b.shuffle_vector(top, ir.Constant(item.floats, ir.Undefined), lanes))
    return top


def _leave_out(item: Item, scratch: Value, low: Value, high: Value) -> None:
    """Gives the places around low..high-1 the lowest score: what was computed there may be anything."""
    e, b = item.e, item.b
    lowest = ir.Constant(item.floats, [float("-inf")] * item.width)
    first, last = (e.splat(b.trunc(bound, I32), item.width) for bound in (low, high))
    for place in range(0, PAGE, item.width):
        lanes = ir.Constant(vector(I32, item.width), list(range(place, place + item.width)))
        inside = b.and_(b.icmp_signed(">=", lanes, first), b.icmp_signed("<", lanes, last))
        e.store(b.select(inside, e.load(scratch, item.floats, 4 * place, align=4), lowest), scratch, 4 * place)


def _change(item: Item, head: Value, scratch: Value, page: Value) -> None:
    """Makes scores of products where there is more to do than scaling: a softcap or slopes."""
    e, b = item.e, item.b
    capped = b.fcmp_ordered("!=", item.cap, F32(0.0))
    slope = e.splat(item.of_head(item.o.slopes, head))
    steps = ir.Constant(vector(I32), list(range(LANES)))
    with cgutils.for_range(b, I64(PAGE // LANES)) as parts:
        place = item.at(scratch, parts.index, 4 * LANES)
        score = e.multiply(e.load(place, vector(F32), align=4), e.splat(item.scale))
        e.store(score, place)
        with b.if_then(capped):
            e.store(_capped(e, score, e.splat(item.cap)), place)
        with b.if_then(b.icmp_signed("!=", item.o.slopes, I64(0))):
            # 0 at the query itself, negative before and behind it.
            first = b.add(b.mul(page, I64(PAGE)), b.mul(parts.index, I64(LANES)))
            first = b.sub(first, item.place)
            distance = b.sitofp(b.add(e.splat(b.trunc(first, I32)), steps), vector(F32))
            distance = b.select(b.fcmp_ordered("<", distance, e.const(distance, 0.0)), distance, e.negate(distance))
            e.store(b.fadd(score, e.multiply(slope, distance)), place)


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
