"""Pieces of code that the kernels of recurrent mixers share: places, vectors in registers, memory on the stack."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from engine.cpu.kernels.emit import F32, I64, LANES, Emitter, Value, vector

VECTOR = 4 * LANES
"""Bytes of a vector of floats."""


def place(builder: Any, base: Value, index: Value, size: Value | int) -> Value:
    """base + index · size."""
    return builder.add(base, builder.mul(index, I64(size) if isinstance(size, int) else size))


def variables(builder: Any, count: int) -> list[Value]:
    """So many vectors in registers."""
    return [cgutils.alloca_once(builder, vector(F32)) for _ in range(count)]


def clear(builder: Any, each: list[Value]) -> None:
    """Variables become zero."""
    for variable in each:
        builder.store(vector(F32)([0.0] * LANES), variable)


def room(builder: Any, floats: int) -> Value:
    """Address of so many floats on the stack."""
    room = cgutils.alloca_once(builder, ir.ArrayType(F32, floats))
    room.align = 64
    return builder.ptrtoint(room, I64)


def state_places(e: Emitter, states: Value, size: Value, zeros: Value, rows: Value) -> tuple[Value, Value]:
    """Addresses of the state that is read and of the one that is written; rows: of their numbers, -1 for zeros."""
    builder = e.builder
    read, write = (e.load(rows, I64, offset, align=8) for offset in (0, 8))
    none = builder.icmp_signed("<", read, I64(0))
    return builder.select(none, zeros, place(builder, states, read, size)), place(builder, states, write, size)


def vector_at(e: Emitter, address: Value, offset: int = 0) -> Value:
    """16 floats."""
    return e.load(address, vector(F32), offset, align=4)


def splat_at(e: Emitter, address: Value) -> Value:
    """One float in every lane."""
    return e.splat(e.load(address, F32, align=4))


def softplus(e: Emitter, x: Value) -> Value:
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
