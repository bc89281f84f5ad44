"""Plain numbers, and the formats of one or two scales per block of whole numbers.

block_format.py says what a format class is.
"""

import numpy as np

from engine.gguf.formats.block_format import BlockFormat, bits, nibbles, scale
from engine.gguf.types import GGMLType


class F32(BlockFormat, type=GGMLType.F32):
    """Plain float32."""

    layout = np.dtype([("x", "<f4")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class F64(BlockFormat, type=GGMLType.F64):
    """Plain float64, rounded to float32."""

    layout = np.dtype([("x", "<f8")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class F16(BlockFormat, type=GGMLType.F16):
    """IEEE half precision."""

    layout = np.dtype([("x", "<f2")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class BF16(BlockFormat, type=GGMLType.BF16):
    """The upper 16 bits of a float32."""

    layout = np.dtype([("x", "<u2")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.left_shift(blocks["x"], 16, out=out.view(np.uint32)[:, 0], dtype=np.uint32)


class I8(BlockFormat, type=GGMLType.I8):
    """Plain integers of 8 bits, each taken as its number."""

    layout = np.dtype([("x", "i1")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class I16(BlockFormat, type=GGMLType.I16):
    """Plain integers of 16 bits, each taken as its number."""

    layout = np.dtype([("x", "<i2")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class I32(BlockFormat, type=GGMLType.I32):
    """Plain integers of 32 bits, each taken as its number, rounded to float32."""

    layout = np.dtype([("x", "<i4")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class I64(BlockFormat, type=GGMLType.I64):
    """Plain integers of 64 bits, each taken as its number, rounded to float32."""

    layout = np.dtype([("x", "<i8")])

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = blocks["x"]


class Q4_0(BlockFormat, type=GGMLType.Q4_0):
    """x = d (q - 8); 4.5 bits per weight.

    Element i < 16 is the low half of qs[i], element 16 + i its high half.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("qs", "u1", 16),  #  2  32 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        q = nibbles(blocks["qs"]).view(np.int8) - np.int8(8)
        np.multiply(scale(blocks["d"]), q, out=out)


class Q4_1(BlockFormat, type=GGMLType.Q4_1):
    """x = d q + m; 5 bits per weight; element order of Q4_0."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("m", "<f2"),  #      2  minimum
            ("qs", "u1", 16),  #  4  32 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(scale(blocks["d"]), nibbles(blocks["qs"]), out=out)
        out += scale(blocks["m"])


class Q5_0(BlockFormat, type=GGMLType.Q5_0):
    """x = d (q - 16); 5.5 bits per weight; low 4 bits in the order of Q4_0, the fifth of element i is bit i of qh."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("qh", "u1", 4),  #   2  fifth bits, element 0 lowest
            ("qs", "u1", 16),  #  6  low 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        q = nibbles(blocks["qs"]) | bits(blocks["qh"]) << 4
        np.multiply(scale(blocks["d"]), q.view(np.int8) - np.int8(16), out=out)


class Q5_1(BlockFormat, type=GGMLType.Q5_1):
    """x = d q + m; 6 bits per weight; element order of Q5_0."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("m", "<f2"),  #      2  minimum
            ("qh", "u1", 4),  #   4  fifth bits, element 0 lowest
            ("qs", "u1", 16),  #  8  low 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        q = nibbles(blocks["qs"]) | bits(blocks["qh"]) << 4
        np.multiply(scale(blocks["d"]), q, out=out)
        out += scale(blocks["m"])


class Q8_0(BlockFormat, type=GGMLType.Q8_0):
    """x = d q; 8.5 bits per weight."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("qs", "i1", 32),  #  2  32 numbers of 8 bits, signed
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(scale(blocks["d"]), blocks["qs"], out=out)


class Q8_1(BlockFormat, type=GGMLType.Q8_1):
    """x = d q; 10 bits per weight as the gguf package sizes it. A format of activations: s serves dot products only."""

    layout = np.dtype(
        [
            ("d", "<f4"),  #      0  scale
            ("s", "<f4"),  #      4  d times the sum of qs
            ("qs", "i1", 32),  #  8  32 numbers of 8 bits, signed
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(scale(blocks["d"]), blocks["qs"], out=out)


class Q8_K(BlockFormat, type=GGMLType.Q8_K):
    """x = d q; 9.125 bits per weight. A format of activations: the sums serve dot products only."""

    layout = np.dtype(
        [
            ("d", "<f4"),  #           0  scale
            ("qs", "i1", 256),  #      4  256 numbers of 8 bits, signed
            ("bsums", "<i2", 16),  # 260  sums of 16 consecutive qs each
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(scale(blocks["d"]), blocks["qs"], out=out)
