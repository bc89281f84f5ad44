"""Attention of a few queries over a cache of keys and values that stays packed as float16, 8 bits or float32.

The query heads that share a head of keys are computed together, so that the cache is read once for all of them; cost
is linear in the number of keys. A page holds keys column by column, which makes neighbouring positions the lanes of a
vector: scores need no sums across lanes. Values are stored row by row. Pages are taken one by one, keys and then
values, with a softmax that is corrected when a page has a larger score; while one is in use, the next is prefetched.
Every number is computed in the same order for any other queries beside it, so a query's result has the same bits in
any batch. Takes addresses and lengths; independent of caches, slots and threads.

What makes up an item's code: item.py (addresses and loops), scores.py, values.py.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.config import PAGE
from engine.cpu.kernels.attention.item import FEW, MANY, Item, Operands, segments
from engine.cpu.kernels.attention.scores import score_page, soften_page
from engine.cpu.kernels.attention.values import begin_head, divide_head, weigh_page
from engine.cpu.kernels.emit import I64, Value
from engine.cpu.kernels.integer.activations import quantize_blocks
from engine.cpu.kernels.integer.groups import smaller
from engine.cpu.kernels.integer.panels import GROUP
from engine.cpu.kernels.stepping import STEP, emitter, format_name, has_32_registers, integers

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"attend": STEP}
"""Argument types of the kernel."""


@intrinsic(prefer_literal=True)
def attend(typing_context, name, operands, low, high, scratch):
    """out[t, h] = sum over j of softmax(cap(scale * q[t, h] . keys[j, h // group]))_j * values[j, h // group].

    Items low..high-1 are pairs (head of keys, t), or with by_token (t, head of keys), the second running fastest: all
    query heads of that head. Query t is at position p[t] of its sequence and sees the keys max(0, p[t] + 1 - window) ..
    p[t]. Where n_keys is not 0, it also sees those behind it, up to min(p[t] + window, n_keys) - 1. The scratch has
    HEAD_FLOATS for each of the H heads, at a multiple of 64.

    cap(s) = softcap * tanh(s / softcap), or s where softcap is 0. `sinks` holds a score of each head that softmax
    counts beside the keys', `slopes` is subtracted per position between query and key (not with a softcap).
    """
    kv_type = format_name(name)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        registers = MANY if has_32_registers(context) else FEW
        _, operands, low, high, scratch = arguments
        o = Operands(*integers(e, operands, 19))
        by_token = builder.icmp_signed("!=", o.by_token, I64(0))
        item = cgutils.alloca_once_value(builder, low)
        more, done = (builder.append_basic_block(name) for name in ("more", "done"))
        builder.cbranch(builder.icmp_signed("<", low, high), more, done)
        builder.position_at_end(more)
        here = builder.load(item)
        per_token = builder.sdiv(here, o.n_kv_heads), builder.srem(here, o.n_kv_heads)
        per_head = builder.srem(here, o.n_tokens), builder.sdiv(here, o.n_tokens)
        token, head = (builder.select(by_token, *pair) for pair in zip(per_token, per_head, strict=True))
        # By token, neighbouring heads of it go through a page together: that is the order of the cache in memory.
        left = smaller(builder, builder.sub(high, here), builder.sub(o.n_kv_heads, head))
        together = builder.select(by_token, left, I64(1))
        _emit(Item(e, o, token, (head, together), scratch, kv_type, registers))
        builder.store(builder.add(here, together), item)
        builder.cbranch(builder.icmp_signed("<", builder.load(item), high), more, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(name, *ARGUMENTS["attend"]), generate


def _emit(item: Item) -> None:
    """Scores, softmax and weighted sums of all heads, page by page."""
    b, o = item.b, item.o
    with item.kv_heads(), cgutils.for_range(b, item.group) as heads:
        begin_head(item, heads.index)
    with segments(item) as (page, low, high):
        keys, values, next_keys = item.page(page)
        with item.kv_heads() as index:
            these_keys = item.at(keys, index, b.mul(item.key_bytes, I64(PAGE)))
            these_values = item.at(values, index, b.mul(item.value_bytes, I64(PAGE)))
            following = b.add(index, I64(1))
            more = b.icmp_signed("<", following, item.n_kv_heads)
            ahead = b.select(more, item.at(these_keys, I64(PAGE), item.key_bytes), next_keys)
            item.each(lambda heads: score_page(item, these_keys, these_values, heads, low, high))
            item.each(lambda heads: soften_page(item, heads, page, low, high))
            item.each(lambda heads: weigh_page(item, these_values, ahead, heads, low, high))
    with item.kv_heads():
        with cgutils.for_range(b, item.group) as heads:
            divide_head(item, heads.index)
        with b.if_then(b.icmp_signed("!=", o.activations, I64(0))):
            n_blocks = b.sdiv(b.mul(item.group, o.value_width), I64(GROUP))
            first = b.sdiv(b.sub(item.out, o.out), I64(4 * GROUP))
            quantize_blocks(item.e, o.out, o.activations, o.form, first, n_blocks)
