"""Delta rules: what recurrent mixers compute between their convolutions and their gates.

Emits one step kernel (stepping.py); the formula is that of delta_heads in engine/cpu/recurrent/delta_net.py. Tokens go
one after the other, each by the same operations, so that the bits do not depend on how a prompt is cut. What an item
keeps of a state stays in the first-level cache over all tokens.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.elementwise import sigmoid
from engine.cpu.kernels.emit import F32, F64, I64, LANES, Value
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
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

MOST_KEYS = 256
"""Most rows of a memory that an item keeps on the stack."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"delta_rule": STEP}
"""Argument types of the kernel."""


@intrinsic(prefer_literal=True)
def delta_rule(typing_context, name, operands, low, high, scratch):
    """M = decay * M; M += k (x) beta * (v - k . M); y = q . M, for items low..high-1.

    An item is V * 16 values of a head. q and k are divided by sqrt(sum of squares + epsilon), q multiplied by `scale`
    as well. The kernel's type is "HEAD/V", one decay for a head; "KEY/V", one for every key; or "STEPS/V", where decay
    holds alpha and beta what its sigmoid is still to be taken of, and a head's decay is exp(a * softplus(alpha +
    dt_bias)), a and dt_bias (H,), which are 0 otherwise. q, k and v have rows of `row` bytes; decay (T, H), or
    (T, H, S), beta (T, H) and out (T, H, P) have no gaps; states: rows of (H, S, P), chosen as in convolution.py. S is
    a multiple of 16, at most MOST_KEYS. Value head h reads key head h / (H / K) where `grouped`, else h mod K.

    Operands: q, k, v, row, decay, beta, states, zeros, rows, out, tokens, heads, key_heads, grouped, keys, values,
    epsilon, scale, a, dt_bias.
    """
    kind, each = format_name(name).split("/")
    per_key, n_vectors = kind == "KEY", int(each)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        numbers = integers(e, operands, 20)
        q, k, v, row, decay, beta, states, zeros, chosen, out, n_tokens, heads = numbers[:12]
        key_heads, grouped, keys, values = numbers[12:16]
        epsilon, scale = (builder.fptrunc(builder.bitcast(bits, F64), F32) for bits in numbers[16:18])
        rates, biases = numbers[18:]
        size = builder.mul(builder.mul(heads, keys), builder.mul(values, I64(4)))
        state, behind = state_places(e, states, size, zeros, chosen)
        memory, step = room(builder, MOST_KEYS * LANES * n_vectors), VECTOR * n_vectors
        squares, sums = variables(builder, 2), variables(builder, 2 * n_vectors)
        root = builder.module.declare_intrinsic("llvm.sqrt", (F32,))
        blocks, one = builder.sdiv(values, I64(LANES * n_vectors)), F32(1.0)

        def added() -> list[Value]:
            """Sums of even and of odd keys together."""
            return [builder.fadd(builder.load(sums[2 * i]), builder.load(sums[2 * i + 1])) for i in range(n_vectors)]

        def copy(base: Value, start: Value, *, back: bool) -> None:
            """The item's memory from a state, or into one."""
            with cgutils.for_range(builder, keys) as each_key:
                there = builder.add(base, builder.mul(builder.add(start, builder.mul(each_key.index, values)), I64(4)))
                here = place(builder, memory, each_key.index, step)
                source, target = (here, there) if back else (there, here)
                for i in range(n_vectors):
                    e.store(vector_at(e, source, VECTOR * i), target, VECTOR * i)

        with cgutils.for_range(builder, builder.sub(high, low)) as items:
            item = builder.add(low, items.index)
            head, value = builder.sdiv(item, blocks), builder.mul(builder.srem(item, blocks), I64(LANES * n_vectors))
            shared = builder.sdiv(builder.mul(head, key_heads), heads)
            key_head = builder.select(builder.icmp_signed("!=", grouped, I64(0)), shared, builder.srem(head, key_heads))
            start = builder.add(builder.mul(builder.mul(head, keys), values), value)
            copy(state, start, back=False)
            with cgutils.for_range(builder, n_tokens) as tokens:
                of_token = builder.mul(tokens.index, row)
                at_key = builder.mul(builder.mul(key_head, keys), I64(4))
                of_q, of_k = (builder.add(builder.add(base, of_token), at_key) for base in (q, k))
                in_row = builder.add(builder.mul(head, values), value)
                of_v = builder.add(builder.add(v, of_token), builder.mul(in_row, I64(4)))
                number = builder.add(builder.mul(tokens.index, heads), head)
                clear(builder, [*squares, *sums])
                with cgutils.for_range(builder, builder.sdiv(keys, I64(LANES))) as part:
                    for base, total in zip((of_q, of_k), squares, strict=True):
                        xs = vector_at(e, place(builder, base, part.index, VECTOR))
                        builder.store(e.multiply_add(xs, xs, builder.load(total)), total)
                lengths = [
                    builder.call(root, (builder.fadd(e.sum_lanes(builder.load(total)), epsilon),)) for total in squares
                ]
                factor_q = e.splat(builder.fdiv(scale, lengths[0]))
                factor_k = e.splat(builder.fdiv(one, lengths[1]))
                factor = splat_at(e, place(builder, beta, number, 4))
                of_head = None
                if kind == "STEPS":
                    factor = sigmoid(e, factor)
                    alpha, bias = place(builder, decay, number, 4), place(builder, biases, head, 4)
                    step_size = softplus(e, builder.fadd(splat_at(e, alpha), splat_at(e, bias)))
                    of_head = e.exp(e.multiply(step_size, splat_at(e, place(builder, rates, head, 4))))
                elif not per_key:
                    of_head = splat_at(e, place(builder, decay, number, 4))
                decays = builder.mul(number, builder.mul(keys, I64(4))) if per_key else builder.mul(number, I64(4))
                of_decay = builder.add(decay, decays)

                def each_pair(visit: Any, of_decay=of_decay, of_head=of_head) -> None:
                    """visit(key, its decay, parity) for all keys, two at a time."""
                    with cgutils.for_range(builder, builder.sdiv(keys, I64(2))) as pair:
                        for parity in range(2):
                            key = builder.add(builder.mul(pair.index, I64(2)), I64(parity))
                            of = splat_at(e, place(builder, of_decay, key, 4)) if of_head is None else of_head
                            visit(key, of, parity)

                def know(key: Value, of: Value, parity: int, of_k=of_k) -> None:
                    taken = splat_at(e, place(builder, of_k, key, 4))
                    taken = e.multiply(taken, of) if per_key else taken
                    here = place(builder, memory, key, step)
                    for i in range(n_vectors):
                        total = sums[2 * i + parity]
                        m = vector_at(e, here, VECTOR * i)
                        builder.store(e.multiply_add(taken, m, builder.load(total)), total)

                each_pair(know)
                changes = []
                for i, known in enumerate(added()):
                    all_known = e.multiply(known, factor_k)
                    if of_head is not None:
                        all_known = e.multiply(all_known, of_head)
                    missing = builder.fsub(vector_at(e, of_v, VECTOR * i), all_known)
                    changes.append(e.multiply(e.multiply(missing, factor), factor_k))
                clear(builder, sums)

                def change(key: Value, of: Value, parity: int, of_q=of_q, of_k=of_k, changes=changes) -> None:
                    brought, asked = (splat_at(e, place(builder, base, key, 4)) for base in (of_k, of_q))
                    here = place(builder, memory, key, step)
                    for i in range(n_vectors):
                        total = sums[2 * i + parity]
                        m = e.multiply_add(brought, changes[i], e.multiply(vector_at(e, here, VECTOR * i), of))
                        e.store(m, here, VECTOR * i)
                        builder.store(e.multiply_add(asked, m, builder.load(total)), total)

                each_pair(change)
                target = place(builder, out, builder.add(builder.mul(number, values), value), 4)
                for i, total in enumerate(added()):
                    e.store(e.multiply(total, factor_q), target, VECTOR * i)
            copy(behind, start, back=True)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate
