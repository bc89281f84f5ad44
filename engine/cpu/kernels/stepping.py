"""The one shape of kernel that a step program calls: step(operands, low, high, scratch).

`operands` is the address of int64 numbers (addresses, lengths, and float64 bit patterns) whose order each kernel
documents; `low`..`high`-1 are the items to work on; `scratch` is memory of the running thread's own. Any split of the
items gives the same bits.
"""

from typing import Any

from numba import types

from engine.cpu.kernels.emit import I64, Emitter, Value

STEP = (types.int64,) * 4
"""Argument types of every step kernel."""


def has_native_half(context: Any) -> bool:
    """Whether the host that a context compiles for converts float16 in hardware."""
    triple, _, features = context.codegen().magic_tuple()[:3]
    return "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64"))


def has_32_registers(context: Any) -> bool:
    """Whether the host that a context compiles for has 32 vector registers of 256 bits."""
    return "+avx512vl" in context.codegen().magic_tuple()[2].split(",")


def emitter(context: Any, builder: Any) -> Emitter:
    """An emitter at the builder's place, for the host that the context compiles for."""
    return Emitter(builder, native_half=has_native_half(context))


def format_name(literal: types.StringLiteral) -> str:
    """The type a kernel's name begins with."""
    # Kernel names carry the version of these sources after the type: "Q4_K:1f0c".
    return str(literal.literal_value).split(":")[0]


def integers(e: Emitter, operands: Value, count: int) -> list[Value]:
    """The first `count` operands."""
    return [e.load(operands, I64, 8 * index, align=8) for index in range(count)]
