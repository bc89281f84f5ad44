"""Emits sums of values by the weights of a page, from clearing a head's result to dividing it by its weights' sum."""

from llvmlite import ir
from numba.core import cgutils

from engine.config import KV_BLOCK, PAGE
from engine.cpu.kernels.attention.item import CORRECTION, FEW, LARGEST, LOG2_E, SUMS, Item
from engine.cpu.kernels.emit import F32, I64, LANES, Value, vector


def begin_head(item: Item, head: Value) -> None:
    """Clears a head's result and the sums of its weights."""
    e, b = item.e, item.b
    zeros, scratch = ir.Constant(item.floats, [0.0] * item.width), item.head_scratch(head)
    target = item.at(item.out, b.mul(head, item.o.value_width), 4)
    with cgutils.for_range(b, b.sdiv(item.o.value_width, I64(item.width))) as parts:
        e.store(zeros, item.at(target, parts.index, 4 * item.width))
    e.store(zeros, scratch, SUMS)
    e.store(F32(float("-inf")), scratch, LARGEST)
    with b.if_then(b.icmp_signed("!=", item.o.sinks, I64(0))):
        e.store(F32(1.0), scratch, SUMS)
        e.store(b.fmul(item.of_head(item.o.sinks, head), F32(LOG2_E)), scratch, LARGEST)


def weigh_page(item: Item, values: Value, ahead: Value, heads: list[Value], low: Value, high: Value) -> None:
    """Corrects the heads' results and adds the values low..high-1 of a page."""
    b, seen, done = item.b, (low, high), I64(0)
    n_vectors = b.sdiv(item.o.value_width, I64(item.width))
    plain = [[item.head_scratch(head) for head in heads]]
    if not item.scaled:
        for n_parts, count in item.registers.pieces(len(heads), n_vectors, b):
            with cgutils.for_range(b, count) as pieces:
                first = b.add(done, b.mul(pieces.index, I64(n_parts)))
                _weigh_columns(item, values, ahead, heads, plain, seen, first, n_parts)
            done = b.add(done, b.mul(count, I64(n_parts)))
        return
    # Two blocks of columns at a time, each with its own weights; of several heads one, in parts, if registers are few.
    block, few = KV_BLOCK // item.width, len(heads) > 1 and item.registers is FEW
    pairs = I64(0) if few else b.sdiv(n_vectors, I64(2 * block))
    for n_blocks, count in ((2, pairs), (1, b.sub(b.sdiv(n_vectors, I64(block)), b.mul(pairs, I64(2))))):
        if few and n_blocks == 2:
            continue
        n_parts = 2 if few else n_blocks * block
        with cgutils.for_range(b, count) as pieces:
            first_block = b.add(done, b.mul(pieces.index, I64(n_blocks)))
            weights = _scale_weights(item, values, ahead, heads, first_block, n_blocks)
            for part in range(0, n_blocks * block, n_parts):
                first = b.add(b.mul(first_block, I64(block)), I64(part))
                _weigh_columns(item, values, ahead, heads, weights, seen, first, n_parts)
        done = b.add(done, b.mul(count, I64(n_blocks)))


def _scale_weights(
    item: Item, values: Value, ahead: Value, heads: list[Value], first: Value, n_blocks: int
) -> list[list[Value]]:
    """Weights of the heads times the scales of each of the blocks: addresses of PAGE floats, by block and head."""
    e, b = item.e, item.b
    room = e.room(4 * PAGE * n_blocks * len(heads))
    addresses = [[e.at(room, 4 * PAGE * (len(heads) * i + j)) for j in range(len(heads))] for i in range(n_blocks)]
    scratches = [item.head_scratch(head) for head in heads]
    for block, places in enumerate(addresses):
        number = b.add(first, I64(block))
        scales = item.scales(values, item.o.value_width, number)
        item.prefetch(item.scales(ahead, item.o.key_width, number), I64(0), 2 * PAGE)
        for part in range(PAGE // item.width):
            scale = item.load_scales(scales, part)
            for scratch, place in zip(scratches, places, strict=True):
                weight = e.load(scratch, item.floats, 4 * item.width * part, align=4)
                e.store(e.multiply(weight, scale), place, 4 * item.width * part)
    return addresses


def _weigh_columns(
    item: Item,
    values: Value,
    ahead: Value,
    heads: list[Value],
    weights: list[list[Value]],
    seen: tuple[Value, Value],
    first: Value,
    n_parts: int,
) -> None:
    """The same of n_parts vectors of columns from number `first` on.

    weights are addresses of PAGE floats by head, for each block of the columns where they have scales, else once.
    """
    e, b, (low, high) = item.e, item.b, seen
    column = b.mul(first, I64(item.width))
    sums = [[cgutils.alloca_once(b, item.floats) for _ in range(n_parts)] for _ in heads]
    places = [item.at(item.at(item.out, b.mul(head, item.o.value_width), 4), column, 4) for head in heads]
    for head, place, row in zip(heads, places, sums, strict=True):
        correction = e.splat(e.load(item.head_scratch(head), F32, CORRECTION, align=4), item.width)
        for part, total in enumerate(row):
            b.store(e.multiply(e.load(place, item.floats, 4 * item.width * part, align=4), correction), total)
    start = item.at(item.at(values, low, item.value_stride), column, item.size)
    share = b.add(ahead, b.mul(column, I64(item.size * PAGE)))
    per_block = n_parts // len(weights)
    with cgutils.for_range(b, b.sub(high, low)) as positions:
        value = item.at(start, positions.index, item.value_stride)
        at_weight = b.mul(b.add(low, positions.index), I64(4))
        item.prefetch(share, positions.index, item.size * item.width * n_parts)
        vs = [item.load(value, item.size * item.width * part) for part in range(n_parts)]
        for block, of_heads in enumerate(weights):
            parts = slice(block * per_block, (block + 1) * per_block)
            for weight, row in zip(of_heads, sums, strict=True):
                x = e.splat(e.load(b.add(weight, at_weight), F32, align=4), item.width)
                for v, total in zip(vs[parts], row[parts], strict=True):
                    b.store(e.multiply_add(v, x, b.load(total)), total)
    for place, row in zip(places, sums, strict=True):
        for part, total in enumerate(row):
            e.store(b.load(total), place, 4 * item.width * part)


def divide_head(item: Item, head: Value) -> None:
    """Divides a head's result by the sum of its weights."""
    e, b = item.e, item.b
    total = e.sum_lanes(e.load(item.head_scratch(head), item.floats, SUMS, align=4))
    inverse = e.splat(b.fdiv(F32(1.0), total))
    target = item.at(item.out, b.mul(head, item.o.value_width), 4)
    with cgutils.for_range(b, b.sdiv(item.o.value_width, I64(LANES))) as parts:
        place = item.at(target, parts.index, 4 * LANES)
        e.store(e.multiply(e.load(place, vector(F32), align=4), inverse), place)
