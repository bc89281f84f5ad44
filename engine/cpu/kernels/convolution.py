"""Short convolutions of recurrent mixers, token after token: one step kernel (stepping.py).

The formula is that of short_convolution in engine/cpu/recurrent/convolution.py.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsics' signatures are read by numba; their arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.elementwise import activate
from engine.cpu.kernels.emit import F32, I64, LANES, Value, vector
from engine.cpu.kernels.recurrent_parts import VECTOR, clear, place, state_places, variables, vector_at
from engine.cpu.kernels.stepping import STEP, emitter, format_name, integers

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"convolve": STEP}
"""Argument types of the kernel."""


@intrinsic(prefer_literal=True)
def convolve(typing_context, name, operands, low, high, scratch):
    """Weighted sums of the last W inputs of channels, for items low..high-1 of V * 16 channels.

    The kernel's type is "SILU/W/V", "PLAIN/W/V" or "GATED/W/V": what becomes of the sum, W, and V. GATED reads rows
    [b, c, u] of C numbers each: inputs are b * u, and the sum is multiplied by c. x has rows of `row` bytes; out (T, C)
    has no gaps; weight (C, W), the newest input's last; bias (C,) or 0. states: rows of (C, W - 1), oldest input
    first; `rows` has two numbers (int64), the row before the first token, or -1 for `zeros`, and the row behind the
    last one, which is written.

    Operands: x, row, weight, bias, states, zeros, rows, out, tokens, channels.
    """
    after, width, each = format_name(name).split("/")
    taps, n_vectors = int(width), int(each)
    kept = taps - 1

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, operands, low, high, _ = arguments
        x, row, weight, bias, states, zeros, chosen, out, n_tokens, channels = integers(e, operands, 10)
        past, behind = state_places(e, states, builder.mul(channels, I64(4 * kept)), zeros, chosen)
        weights, biases = variables(builder, taps * n_vectors), variables(builder, n_vectors)
        inputs = variables(builder, kept * n_vectors)

        def gathered(base: Value, first: Value, columns: int, column: int) -> Value:
            """One column of 16 rows."""
            start = place(builder, base, first, 4 * columns)
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
                clear(builder, [biases[v]])
                with builder.if_then(builder.icmp_signed("!=", bias, I64(0))):
                    builder.store(vector_at(e, place(builder, bias, first, 4)), biases[v])
            column = builder.mul(channel, I64(4))
            with cgutils.for_range(builder, n_tokens) as tokens:
                source = builder.add(place(builder, x, tokens.index, row), column)
                target = builder.add(place(builder, out, tokens.index, builder.mul(channels, I64(4))), column)
                for v in range(n_vectors):
                    before = [builder.load(one) for one in inputs[v * kept : (v + 1) * kept]]
                    newest = vector_at(e, source, VECTOR * v)
                    if after == "GATED":
                        newest = e.multiply(newest, vector_at(e, place(builder, source, channels, 8), VECTOR * v))
                    taken = [builder.load(one) for one in weights[v * taps : (v + 1) * taps]]
                    total = e.multiply(before[0], taken[0]) if before else e.multiply(newest, taken[0])
                    for one, factor in zip([*before[1:], newest], taken[1:], strict=True):
                        total = e.multiply_add(one, factor, total)
                    total = builder.fadd(total, builder.load(biases[v]))
                    if after == "GATED":
                        total = e.multiply(total, vector_at(e, place(builder, source, channels, 4), VECTOR * v))
                    e.store(activate(e, total, "SILU") if after == "SILU" else total, target, VECTOR * v)
                    for one, variable in zip([*before[1:], newest], inputs[v * kept : (v + 1) * kept], strict=True):
                        builder.store(one, variable)
            for v, first in enumerate(firsts):
                start = place(builder, behind, first, 4 * kept)
                for tap in range(kept):
                    value = builder.load(inputs[v * kept + tap])
                    for lane in range(LANES):
                        one = builder.extract_element(value, I64(lane))
                        e.store(one, start, 4 * (lane * kept + tap))
        return context.get_dummy_value()

    return types.void(name, *STEP), generate
