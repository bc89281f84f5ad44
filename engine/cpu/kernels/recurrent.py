"""Recurrent mixers between their products: short convolutions, delta rules, and the scans of Mamba 2.

Each emits one step kernel (stepping.py); the formulas are those of the functions in engine/cpu/recurrent. Tokens go
one after the other, each by the same operations, so that the bits do not depend on how a prompt is cut. What an item
keeps of a state stays in the first-level cache over all tokens.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.elementwise import activate, sigmoid
from engine.cpu.kernels.emit import F32, F64, I64, LANES, Emitter, Value, vector
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

MOST_KEYS = 256
"""Most rows of a memory, or states of a channel, that an item keeps on the stack."""

CHANNELS = 16
"""Channels of an item of grouped_scan."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"convolve": STEP, "delta_rule": STEP, "grouped_scan": STEP}
"""Argument types of each kernel."""

_VECTOR = 4 * LANES  # bytes


def _place(builder: Any, base: Value, index: Value, size: Value | int) -> Value:
    return builder.add(base, builder.mul(index, I64(size) if isinstance(size, int) else size))


def _variables(builder: Any, count: int) -> list[Value]:
    return [cgutils.alloca_once(builder, vector(F32)) for _ in range(count)]


def _clear(builder: Any, variables: list[Value]) -> None:
    for variable in variables:
        builder.store(vector(F32)([0.0] * LANES), variable)


def _room(builder: Any, floats: int) -> Value:
    """Address of so many floats on the stack."""
    room = cgutils.alloca_once(builder, ir.ArrayType(F32, floats))
    room.align = 64
    return builder.ptrtoint(room, I64)


def _vector_at(e: Emitter, place: Value, offset: int = 0) -> Value:
    return e.load(place, vector(F32), offset, align=4)


def _splat_at(e: Emitter, place: Value) -> Value:
    return e.splat(e.load(place, F32, align=4))


def _softplus(e: Emitter, x: Value) -> Value:
    """log(1 + exp(x)) = max(x, 0) + log(1 + u), u = exp(-|x|); log(1 + u) = 2 artanh(s) with s = u / (2 + u) <= 1/3."""
    builder, zero = e.builder, e.const(x, 0.0)
    positive = builder.fcmp_ordered(">", x, zero)
    u = e.exp(builder.select(positive, e.negate(x), x))
    s = builder.fdiv(u, builder.fadd(u, e.const(x, 2.0)))
    square = e.multiply(s, s)
    total = e.const(x, 2.0 / 15)
    for power in (13, 11, 9, 7, 5, 3, 1):
        total = e.multiply_add(total, square, e.const(x, 2.0 / power))
    return e.multiply_add(total, s, builder.select(positive, x, zero))


@intrinsic(prefer_literal=True)
def convolve(typing_context, name, operands, low, high, scratch):
    """Weighted sums of the last W inputs of channels, for items low..high-1 of V * 16 channels.

    The kernel's type is "SILU/W/V" or "PLAIN/W/V": what becomes of the sum, W, and V. x has rows of `row` bytes; out
    (T, C) has no gaps; weight (C, W), the newest input's last; bias (C,) or 0; past and behind (C, W - 1), oldest
    first: the inputs before the first token, and those that the token behind the last one needs.

    Operands: x, row, weight, bias, past, behind, out, tokens, channels.
    """
    after, width, each = format_name(name).split("/")
    taps, n_vectors = int(width), int(each)
    kept = taps - 1

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, row, weight, bias, past, behind, out, n_tokens, channels = integers(e, operands, 9)
        weights, biases = _variables(builder, taps * n_vectors), _variables(builder, n_vectors)
        inputs = _variables(builder, kept * n_vectors)

        def gathered(base: Value, first: Value, columns: int, column: int) -> Value:
            """One column of 16 rows."""
            start = _place(builder, base, first, 4 * columns)
            lanes = [e.load(start, F32, 4 * (lane * columns + column), align=4) for lane in range(LANES)]
            return e.join(lanes, vector(F32))

        with cgutils.for_range(builder, builder.sub(high, low)) as items:
            channel = builder.mul(builder.add(low, items.index), I64(LANES * n_vectors))
            firsts = [builder.add(channel, I64(LANES * v)) for v in range(n_vectors)]
            for v, first in enumerate(firsts):
                for tap in range(taps):
                    builder.store(gathered(weight, first, taps, tap), weights[v * taps + tap])
                for tap in range(kept):
                    builder.store(gathered(past, first, kept, tap), inputs[v * kept + tap])
                _clear(builder, [biases[v]])
                with builder.if_then(builder.icmp_signed("!=", bias, I64(0))):
                    builder.store(_vector_at(e, _place(builder, bias, first, 4)), biases[v])
            column = builder.mul(channel, I64(4))
            with cgutils.for_range(builder, n_tokens) as tokens:
                source = builder.add(_place(builder, x, tokens.index, row), column)
                target = builder.add(_place(builder, out, tokens.index, builder.mul(channels, I64(4))), column)
                for v in range(n_vectors):
                    before = [builder.load(one) for one in inputs[v * kept : (v + 1) * kept]]
                    newest = _vector_at(e, source, _VECTOR * v)
                    taken = [builder.load(one) for one in weights[v * taps : (v + 1) * taps]]
                    total = e.multiply(before[0], taken[0]) if before else e.multiply(newest, taken[0])
                    for one, factor in zip([*before[1:], newest], taken[1:], strict=True):
                        total = e.multiply_add(one, factor, total)
                    total = builder.fadd(total, builder.load(biases[v]))
                    e.store(activate(e, total, "SILU") if after == "SILU" else total, target, _VECTOR * v)
                    for one, variable in zip([*before[1:], newest], inputs[v * kept : (v + 1) * kept], strict=True):
                        builder.store(one, variable)
            for v, first in enumerate(firsts):
                start = _place(builder, behind, first, 4 * kept)
                for tap in range(kept):
                    value = builder.load(inputs[v * kept + tap])
                    for lane in range(LANES):
                        one = builder.extract_element(value, I64(lane))
                        e.store(one, start, 4 * (lane * kept + tap))
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def delta_rule(typing_context, name, operands, low, high, scratch):
    """M = decay * M; M += k (x) beta * (v - k . M); y = q . M, for items low..high-1.

    An item is V * 16 values of a head. q and k are divided by sqrt(sum of squares + epsilon), q multiplied by `scale`
    as well. The kernel's type is "HEAD/V", one decay for a head; "KEY/V", one for every key; or "STEPS/V", where decay
    holds alpha and beta what its sigmoid is still to be taken of, and a head's decay is exp(a * softplus(alpha +
    dt_bias)), a and dt_bias (H,), which are 0 otherwise. q, k and v have rows of
    `row` bytes; decay (T, H), or (T, H, S), beta (T, H) and out (T, H, P) have no gaps; state and behind (H, S, P). S
    is a multiple of 16, at most MOST_KEYS. Value head h reads key head h / (H / K) where `grouped`, else h mod K.

    Operands: q, k, v, row, decay, beta, state, behind, out, tokens, heads, key_heads, grouped, keys, values, epsilon,
    scale, a, dt_bias.
    """
    kind, each = format_name(name).split("/")
    per_key, n_vectors = kind == "KEY", int(each)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        numbers = integers(e, operands, 19)
        q, k, v, row, decay, beta, state, behind, out, n_tokens, heads, key_heads, grouped, keys, values = numbers[:15]
        epsilon, scale = (builder.fptrunc(builder.bitcast(bits, F64), F32) for bits in numbers[15:17])
        rates, biases = numbers[17:]
        memory, step = _room(builder, MOST_KEYS * LANES * n_vectors), _VECTOR * n_vectors
        squares, sums = _variables(builder, 2), _variables(builder, 2 * n_vectors)
        root = builder.module.declare_intrinsic("llvm.sqrt", (F32,))
        blocks, one = builder.sdiv(values, I64(LANES * n_vectors)), F32(1.0)

        def added() -> list[Value]:
            """Sums of even and of odd keys together."""
            return [builder.fadd(builder.load(sums[2 * i]), builder.load(sums[2 * i + 1])) for i in range(n_vectors)]

        def copy(base: Value, start: Value, *, back: bool) -> None:
            """The item's memory from a state, or into one."""
            with cgutils.for_range(builder, keys) as each_key:
                there = builder.add(base, builder.mul(builder.add(start, builder.mul(each_key.index, values)), I64(4)))
                here = _place(builder, memory, each_key.index, step)
                source, target = (here, there) if back else (there, here)
                for i in range(n_vectors):
                    e.store(_vector_at(e, source, _VECTOR * i), target, _VECTOR * i)

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
                _clear(builder, [*squares, *sums])
                with cgutils.for_range(builder, builder.sdiv(keys, I64(LANES))) as part:
                    for base, total in zip((of_q, of_k), squares, strict=True):
                        xs = _vector_at(e, _place(builder, base, part.index, _VECTOR))
                        builder.store(e.multiply_add(xs, xs, builder.load(total)), total)
                lengths = [
                    builder.call(root, (builder.fadd(e.sum_lanes(builder.load(total)), epsilon),)) for total in squares
                ]
                factor_q = e.splat(builder.fdiv(scale, lengths[0]))
                factor_k = e.splat(builder.fdiv(one, lengths[1]))
                factor = _splat_at(e, _place(builder, beta, number, 4))
                of_head = None
                if kind == "STEPS":
                    factor = sigmoid(e, factor)
                    alpha, bias = _place(builder, decay, number, 4), _place(builder, biases, head, 4)
                    step_size = _softplus(e, builder.fadd(_splat_at(e, alpha), _splat_at(e, bias)))
                    of_head = e.exp(e.multiply(step_size, _splat_at(e, _place(builder, rates, head, 4))))
                elif not per_key:
                    of_head = _splat_at(e, _place(builder, decay, number, 4))
                decays = builder.mul(number, builder.mul(keys, I64(4))) if per_key else builder.mul(number, I64(4))
                of_decay = builder.add(decay, decays)

                def each_pair(visit: Any, of_decay=of_decay, of_head=of_head) -> None:
                    """visit(key, its decay, parity) for all keys, two at a time."""
                    with cgutils.for_range(builder, builder.sdiv(keys, I64(2))) as pair:
                        for parity in range(2):
                            key = builder.add(builder.mul(pair.index, I64(2)), I64(parity))
                            of = _splat_at(e, _place(builder, of_decay, key, 4)) if of_head is None else of_head
                            visit(key, of, parity)

                def know(key: Value, of: Value, parity: int, of_k=of_k) -> None:
                    taken = _splat_at(e, _place(builder, of_k, key, 4))
                    taken = e.multiply(taken, of) if per_key else taken
                    here = _place(builder, memory, key, step)
                    for i in range(n_vectors):
                        total = sums[2 * i + parity]
                        m = _vector_at(e, here, _VECTOR * i)
                        builder.store(e.multiply_add(taken, m, builder.load(total)), total)

                each_pair(know)
                changes = []
                for i, known in enumerate(added()):
                    all_known = e.multiply(known, factor_k)
                    if of_head is not None:
                        all_known = e.multiply(all_known, of_head)
                    missing = builder.fsub(_vector_at(e, of_v, _VECTOR * i), all_known)
                    changes.append(e.multiply(e.multiply(missing, factor), factor_k))
                _clear(builder, sums)

                def change(key: Value, of: Value, parity: int, of_q=of_q, of_k=of_k, changes=changes) -> None:
                    brought, asked = (_splat_at(e, _place(builder, base, key, 4)) for base in (of_k, of_q))
                    here = _place(builder, memory, key, step)
                    for i in range(n_vectors):
                        total = sums[2 * i + parity]
                        m = e.multiply_add(brought, changes[i], e.multiply(_vector_at(e, here, _VECTOR * i), of))
                        e.store(m, here, _VECTOR * i)
                        builder.store(e.multiply_add(asked, m, builder.load(total)), total)

                each_pair(change)
                target = _place(builder, out, builder.add(builder.mul(number, values), value), 4)
                for i, total in enumerate(added()):
                    e.store(e.multiply(total, factor_q), target, _VECTOR * i)
            copy(behind, start, back=True)
        return context.get_dummy_value()

    return types.void(name, *STEP), generate


@intrinsic(prefer_literal=True)
def grouped_scan(typing_context, name, operands, low, high, scratch):
    """h = decay * h + (delta * x) (x) b; y = h . c + d * x, for items low..high-1: heads times blocks of CHANNELS.

    x, b and c have rows of `row` bytes; delta and decay (T, H), d (H,) and out (T, H, P) have no gaps; state and behind
    (H, P, S). H / G heads share b and c. S is a multiple of 16, at most MOST_KEYS.

    Operands: x, b, c, row, delta, decay, d, state, behind, out, tokens, heads, groups, width (P), states (S).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, b, c, row, delta, decay, d, state, behind, out, n_tokens, heads, groups, width, states = integers(
            e, operands, 15
        )
        memory = _room(builder, MOST_KEYS * CHANNELS)
        (total,) = _variables(builder, 1)
        blocks, row_bytes = builder.sdiv(width, I64(CHANNELS)), builder.mul(states, I64(4))
        parts = builder.sdiv(builder.mul(states, I64(CHANNELS)), I64(LANES))

        def copy(source: Value, target: Value) -> None:
            with cgutils.for_range(builder, parts) as part:
                value = _vector_at(e, _place(builder, source, part.index, _VECTOR))
                e.store(value, _place(builder, target, part.index, _VECTOR))

        with cgutils.for_range(builder, builder.sub(high, low)) as items:
            item = builder.add(low, items.index)
            head, first = builder.sdiv(item, blocks), builder.mul(builder.srem(item, blocks), I64(CHANNELS))
            group = builder.sdiv(builder.mul(head, groups), heads)
            channel = builder.add(builder.mul(head, width), first)
            skip, start = _splat_at(e, _place(builder, d, head, 4)), builder.mul(channel, row_bytes)
            copy(builder.add(state, start), memory)
            with cgutils.for_range(builder, n_tokens) as tokens:
                of_token, number = builder.mul(tokens.index, row), builder.add(builder.mul(tokens.index, heads), head)
                at_group = builder.mul(group, row_bytes)
                of_b, of_c = (builder.add(builder.add(base, of_token), at_group) for base in (b, c))
                of_x = _place(builder, builder.add(x, of_token), channel, 4)
                step, kept = (_splat_at(e, _place(builder, base, number, 4)) for base in (delta, decay))
                inner = builder.mul(heads, width)
                target = _place(builder, out, builder.add(builder.mul(tokens.index, inner), channel), 4)
                with cgutils.for_range(builder, I64(CHANNELS)) as each:
                    taken = _splat_at(e, _place(builder, of_x, each.index, 4))
                    scaled, here = e.multiply(taken, step), _place(builder, memory, each.index, row_bytes)
                    _clear(builder, [total])
                    with cgutils.for_range(builder, builder.sdiv(states, I64(LANES))) as part:
                        at = _place(builder, here, part.index, _VECTOR)
                        bs, cs = (_vector_at(e, _place(builder, base, part.index, _VECTOR)) for base in (of_b, of_c))
                        h = e.multiply_add(scaled, bs, e.multiply(_vector_at(e, at), kept))
                        e.store(h, at)
                        builder.store(e.multiply_add(h, cs, builder.load(total)), total)
                    y = e.sum_lanes(builder.load(total))
                    passed = builder.extract_element(e.multiply(taken, skip), I64(0))
                    e.store(builder.fadd(y, passed), _place(builder, target, each.index, 4))
            copy(memory, builder.add(behind, start))
        return context.get_dummy_value()

    return types.void(name, *STEP), generate
