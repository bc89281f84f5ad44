"""Scans of Mamba 1 and 2: what the mixers compute between their convolutions and their last products or norms.

Each emits one step kernel (stepping.py); the formulas are those of selective_scan and scan_heads in
engine/cpu/recurrent. Tokens go one after the other, each by the same operations, so that the bits do not depend on how
a prompt is cut. The first token reads an item's states where the sequence has them and the last one writes them where
they belong; between them they stay on the stack.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.elementwise import activate
from engine.cpu.kernels.emit import I64, LANES, Value
from engine.cpu.kernels.recurrent_parts import (
    VECTOR,
    clear,
    place,
    room,
    softplus,
    splat_at,
    state_places,
    variables,
    vector_at,
)
from engine.cpu.kernels.stepping import STEP, emitter, integers

MOST_STATES = 256
"""Most states of a channel that an item keeps on the stack."""

CHANNELS = LANES
"""Channels of an item."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"grouped_scan": STEP, "selective_scan": STEP}
"""Argument types of each kernel."""


@intrinsic(prefer_literal=True)
def grouped_scan(typing_context, name, operands, low, high, scratch):
    """h = exp(delta * a) * h + (delta * x) (x) b; y = (h . c + d * x) * silu(z), for items low..high-1.

    Items are heads times blocks of CHANNELS. delta is softplus(steps + dt_bias). x, b and c have rows of `row` bytes,
    steps (T, H) and z (T, H * P) of `in_row` bytes; a, d and dt_bias (H,) and out (T, H, P) have no gaps; states: rows
    of (H, P, S), chosen as in convolution.py, at addresses that are multiples of 64. H / G heads share b and c. S is a
    multiple of 16, at most MOST_STATES. States of the last token bypass the caches: a model's are tens of megabytes,
    and a cache would read them from memory before it writes them.

    Operands: x, b, c, row, steps, z, in_row, a, d, dt_bias, states, zeros, rows, out, tokens, heads, groups, width (P),
    states (S).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        numbers = integers(e, operands, 19)
        x, b, c, row, steps, z, in_row, a, d, biases, kept_states, zeros, chosen, out = numbers[:14]
        n_tokens, heads, groups, width, states = numbers[14:]
        size = builder.mul(builder.mul(heads, width), builder.mul(states, I64(4)))
        state, behind = state_places(e, kept_states, size, zeros, chosen)
        memory = room(builder, MOST_STATES * CHANNELS)
        (total,) = variables(builder, 1)
        blocks, row_bytes = builder.sdiv(width, I64(CHANNELS)), builder.mul(states, I64(4))

        with cgutils.for_range(builder, builder.sub(high, low)) as items:
            item = builder.add(low, items.index)
            head, first = builder.sdiv(item, blocks), builder.mul(builder.srem(item, blocks), I64(CHANNELS))
            group = builder.sdiv(builder.mul(head, groups), heads)
            channel = builder.add(builder.mul(head, width), first)
            skip, start = splat_at(e, place(builder, d, head, 4)), builder.mul(channel, row_bytes)
            with cgutils.for_range(builder, n_tokens) as tokens:
                source, end = _places(builder, tokens.index, n_tokens, memory, state, behind, start)
                of_token, of_input = builder.mul(tokens.index, row), builder.mul(tokens.index, in_row)
                at_group = builder.mul(group, row_bytes)
                of_b, of_c = (builder.add(builder.add(base, of_token), at_group) for base in (b, c))
                of_x = place(builder, builder.add(x, of_token), channel, 4)
                given = splat_at(e, place(builder, builder.add(steps, of_input), head, 4))
                step = softplus(e, builder.fadd(given, splat_at(e, place(builder, biases, head, 4))))
                kept = e.exp(e.multiply(step, splat_at(e, place(builder, a, head, 4))))
                inner = builder.mul(heads, width)
                target = place(builder, out, builder.add(builder.mul(tokens.index, inner), channel), 4)

                def channels(keep: Any, here=source, there=end, of=(of_x, of_b, of_c), moved=(step, kept)) -> None:
                    """All channels of the item; keep(value, address) stores states."""
                    with cgutils.for_range(builder, I64(CHANNELS)) as each:
                        taken = splat_at(e, place(builder, of[0], each.index, 4))
                        scaled = e.multiply(taken, moved[0])
                        first, behind_it = (place(builder, base, each.index, row_bytes) for base in (here, there))
                        clear(builder, [total])
                        with cgutils.for_range(builder, builder.sdiv(states, I64(LANES))) as part:
                            at, to, of_b, of_c = (
                                place(builder, base, part.index, VECTOR) for base in (first, behind_it, *of[1:])
                            )
                            h = e.multiply_add(scaled, vector_at(e, of_b), e.multiply(vector_at(e, at), moved[1]))
                            keep(h, to)
                            builder.store(e.multiply_add(h, vector_at(e, of_c), builder.load(total)), total)
                        y = e.sum_lanes(builder.load(total))
                        passed = builder.extract_element(e.multiply(taken, skip), I64(0))
                        e.store(builder.fadd(y, passed), place(builder, target, each.index, 4))

                is_last = builder.icmp_signed("==", builder.add(tokens.index, I64(1)), n_tokens)
                with builder.if_else(is_last) as (last, others):
                    with last:
                        channels(e.stream)
                    with others:
                        channels(e.store)
                gate = vector_at(e, place(builder, builder.add(z, of_input), channel, 4))
                e.store(e.multiply(vector_at(e, target), activate(e, gate, "SILU")), target)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def selective_scan(typing_context, name, operands, low, high, scratch):
    """h = h * exp(delta * a) + (delta * u) (x) b; y = (h . c + d * u) * silu(z), for items low..high-1 of 16 channels.

    delta is softplus(steps). u, steps, z and out have rows of I channels, those of z `z_row` bytes apart, the others
    without gaps; b and c have rows of `row` bytes; a (I, S) and d (I,); states: rows of (I, S), chosen as in
    convolution.py. S is a multiple of 16, at most MOST_STATES.

    Operands: u, steps, b, c, row, a, d, z, z_row, states, zeros, rows, out, tokens, inner (I), states (S).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        numbers = integers(e, operands, 16)
        u, steps, b, c, row, a, d, z, z_row, kept_states, zeros, chosen, out, n_tokens, inner, states = numbers
        row_bytes = builder.mul(states, I64(4))
        state, behind = state_places(e, kept_states, builder.mul(inner, row_bytes), zeros, chosen)
        memory, sizes = room(builder, MOST_STATES * CHANNELS), room(builder, CHANNELS)
        (total,) = variables(builder, 1)

        with cgutils.for_range(builder, builder.sub(high, low)) as items:
            channel = builder.mul(builder.add(low, items.index), I64(CHANNELS))
            start = builder.mul(channel, row_bytes)
            rates, skips = builder.add(a, start), vector_at(e, place(builder, d, channel, 4))
            with cgutils.for_range(builder, n_tokens) as tokens:
                source, end = _places(builder, tokens.index, n_tokens, memory, state, behind, start)
                own = builder.mul(builder.add(builder.mul(tokens.index, inner), channel), I64(4))
                of_u, target = builder.add(u, own), builder.add(out, own)
                of_b, of_c = (place(builder, base, tokens.index, row) for base in (b, c))
                e.store(softplus(e, vector_at(e, builder.add(steps, own))), sizes)
                with cgutils.for_range(builder, I64(CHANNELS)) as each:
                    step, taken = (splat_at(e, place(builder, base, each.index, 4)) for base in (sizes, of_u))
                    scaled = e.multiply(taken, step)
                    here, there, rate = (place(builder, base, each.index, row_bytes) for base in (source, end, rates))
                    clear(builder, [total])
                    with cgutils.for_range(builder, builder.sdiv(states, I64(LANES))) as part:
                        at, to, of_a = (place(builder, base, part.index, VECTOR) for base in (here, there, rate))
                        bs, cs = (vector_at(e, place(builder, base, part.index, VECTOR)) for base in (of_b, of_c))
                        kept = e.exp(e.multiply(step, vector_at(e, of_a)))
                        h = e.multiply_add(scaled, bs, e.multiply(vector_at(e, at), kept))
                        e.store(h, to)
                        builder.store(e.multiply_add(h, cs, builder.load(total)), total)
                    e.store(e.sum_lanes(builder.load(total)), place(builder, target, each.index, 4))
                y = e.multiply_add(vector_at(e, of_u), skips, vector_at(e, target))
                gate = vector_at(e, place(builder, place(builder, z, tokens.index, z_row), channel, 4))
                e.store(e.multiply(y, activate(e, gate, "SILU")), target)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


def _places(
    builder: Any, token: Value, n_tokens: Value, memory: Value, state: Value, behind: Value, start: Value
) -> tuple[Value, Value]:
    """Where a token finds an item's states, and where it leaves them; start: the item's part of a sequence's."""
    is_first = builder.icmp_signed("==", token, I64(0))
    is_last = builder.icmp_signed("==", builder.add(token, I64(1)), n_tokens)
    read = builder.select(is_first, builder.add(state, start), memory)
    return read, builder.select(is_last, builder.add(behind, start), memory)
