"""Products of groups in AMX's tile registers: integers of 16 tokens times 16 rows of weights by one instruction.

A group's activations, 32 bytes of each token, are one matrix, its eight vectors of unpacked weights another, as they
are in memory. Their products are sums of integers, which go through memory into vectors, 16 rows of a token in each.
Knows no formats.
"""

import struct
from typing import Any

from llvmlite import ir

from engine.cpu.kernels import isa
from engine.cpu.kernels.emit import I8, I32, I64, Emitter, Value, vector
from engine.cpu.kernels.integer.panels import GROUP

TOKENS = 16
"""Rows of a tile register: tokens multiplied at once."""

ROW_BYTES = 64
"""Bytes of a row of sums, or of weights: four columns of 16 rows of weights."""

_SUMS, _TOKENS, _WEIGHTS = 0, 2, 4
"""Tile registers; each is followed by one for the second part of a group."""


class Matrices:
    """The registers while a kernel is emitted.

    Args:
        e: where the instructions go.
        n_parts: 1, or 2 where the first and the last 16 columns of a group are summed apart.
        stride: bytes between the activations of two tokens.
    """

    def __init__(self, e: Emitter, n_parts: int, stride: int) -> None:
        self._e, self._n_parts, self._stride = e, n_parts, stride
        self._columns = GROUP // n_parts
        self._room = e.room(n_parts * TOKENS * ROW_BYTES)

    def configure(self) -> None:
        """Sets the sizes of the registers, for the thread that runs this."""
        shapes = {}
        for part in range(self._n_parts):
            shapes[_SUMS + part] = TOKENS, ROW_BYTES
            shapes[_TOKENS + part] = TOKENS, self._columns
            shapes[_WEIGHTS + part] = self._columns // 4, ROW_BYTES
        rows, widths = ([shapes.get(register, (0, 0))[of] for register in range(8)] for of in range(2))
        # Palette 1; bytes of a row from byte 16 on, rows from byte 48 on.
        numbers = struct.unpack("64B", struct.pack("<B15x8H16x8B8x", 1, *widths, *rows))
        room, e = self._e.room(len(numbers)), self._e
        e.store(ir.Constant(vector(I8, len(numbers)), list(numbers)), room, align=1)
        self._call("ldtilecfg", self._pointer(room))

    def release(self) -> None:
        """Gives the registers up, so that the system need not save them."""
        self._call("tilerelease")

    def multiply(self, weights: Value, tokens: Value) -> None:
        """Multiplies the group of weights at an address with activations of TOKENS tokens, from another one on.

        The processor begins the next groups while sums of this one are read: to emit it in that order gained nothing.
        """
        e = self._e
        for part in range(self._n_parts):
            sums, left, right = (I8(first + part) for first in (_SUMS, _TOKENS, _WEIGHTS))
            some_tokens = self._pointer(e.at(tokens, self._columns * part))
            some_weights = self._pointer(e.at(weights, ROW_BYTES * self._columns // 4 * part))
            self._call("tilezero", sums)
            self._call("tileloadd64", left, some_tokens, I64(self._stride))
            self._call("tileloadd64", right, some_weights, I64(ROW_BYTES))
            self._call("tdpbssd", sums, left, right)
            self._call("tilestored64", sums, self._pointer(self._place(part, 0)), I64(ROW_BYTES))

    def sums(self, part: int, token: int) -> Value:
        """Sums of products of a part of the group with a token, 16 x i32."""
        return self._e.load(self._place(part, token), vector(I32, ROW_BYTES // 4), align=ROW_BYTES)

    def _place(self, part: int, token: int) -> Value:
        return self._e.at(self._room, ROW_BYTES * (TOKENS * part + token))

    def _pointer(self, address: Value) -> Value:
        return self._e.builder.inttoptr(address, I8.as_pointer())

    def _call(self, name: str, *operands: Any) -> None:
        isa.call(self._e, f"llvm.x86.{name}", ir.VoidType(), *operands)
