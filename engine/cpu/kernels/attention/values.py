"""Emits sums of values by the weights of a page, from clearing a head's result to dividing it by its weights' sum."""

from llvmlite import ir
from numba.core import cgutils

from engine.config import PAGE
from engine.cpu.kernels.attention.item import CORRECTION, LARGEST, LOG2_E, SUMS, Item
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
    b, o = item.b, item.o
    done = I64(0)
    for n_parts, count in item.registers.pieces(len(heads), b.sdiv(o.value_width, I64(item.width)), b):
        with cgutils.for_range(b, count) as pieces:
            column = b.mul(b.add(done, b.mul(pieces.index, I64(n_parts))), I64(item.width))
            _weigh_columns(item, values, ahead, heads, low, high, column, n_parts)
        done = b.add(done, b.mul(count, I64(n_parts)))


def _weigh_columns(
    item: Item, values: Value, ahead: Value, heads: list[Value], low: Value, high: Value, column: Value, n_parts: int
) -> None:
    e, b = item.e, item.b
    sums = [[cgutils.alloca_once(b, item.floats) for _ in range(n_parts)] for _ in heads]
    places = [item.at(item.at(item.out, b.mul(head, item.o.value_width), 4), column, 4) for head in heads]
    scratches = [item.head_scratch(head) for head in heads]
    for scratch, place, row in zip(scratches, places, sums, strict=True):
        correction = e.splat(e.load(scratch, F32, CORRECTION, align=4), item.width)
        for part, total in enumerate(row):
            b.store(e.multiply(e.load(place, item.floats, 4 * item.width * part, align=4), correction), total)
    weights = [item.at(scratch, low, 4) for scratch in scratches]
    first = item.at(item.at(values, low, item.value_bytes), column, item.size)
    share = b.add(ahead, b.mul(column, I64(item.size * PAGE)))
    with cgutils.for_range(b, b.sub(high, low)) as positions:
        value = item.at(first, positions.index, item.value_bytes)
        item.prefetch(share, positions.index, item.size * item.width * n_parts)
        vs = [item.load(value, item.size * item.width * part) for part in range(n_parts)]
        for weight, row in zip(weights, sums, strict=True):
            x = e.splat(e.load(item.at(weight, positions.index, 4), F32, align=4), item.width)
            for v, total in zip(vs, row, strict=True):
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
