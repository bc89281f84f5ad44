"""Formats of one or two bits and one scale per block: ternary ones, and plain ones of signs or four levels.

block_format.py says what a format class is.
"""

import numpy as np

from engine.gguf.formats.block_format import BlockFormat, bits, fields, scale
from engine.gguf.types import GGMLType


def trits(packed: np.ndarray, count: int) -> np.ndarray:
    """Split bytes (n, m) into base-3 digits (n, count * m) as int8 -1, 0, 1: the first of all bytes, the second, ...

    A byte b means the fraction b / 256, and its digits are those of that fraction in base 3: multiplying by 3^k modulo
    256 drops the first k, and the next one is the whole part of three times the rest.
    """
    powers = 3 ** np.arange(count, dtype=np.uint8)
    left = packed[:, None, :] * powers[:, None]
    return ((left.astype(np.uint16) * 3 >> 8).astype(np.int8) - np.int8(1)).reshape(len(packed), -1)


class TQ1_0(BlockFormat, type=GGMLType.TQ1_0):
    """x = d t, t one of -1, 0, 1; 1.6875 bits per weight.

    Five weights in a byte, as base-3 digits (trits): qs[0:32] hold elements 0-159, qs[32:48] elements 160-239, each
    first their first digits, then their second ones, and so on. qh holds the last 16 elements, four in a byte.
    """

    layout = np.dtype(
        [
            ("qs", "u1", 48),  #   0  240 trits
            ("qh", "u1", 4),  #   48  16 trits
            ("d", "<f2"),  #      52  scale
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        d, qs = scale(blocks["d"]), blocks["qs"]
        for part, first, last in ((trits(qs[:, :32], 5), 0, 160), (trits(qs[:, 32:], 5), 160, 240)):
            np.multiply(d, part, out=out[:, first:last])
        np.multiply(d, trits(blocks["qh"], 4), out=out[:, 240:])


class TQ2_0(BlockFormat, type=GGMLType.TQ2_0):
    """x = d (q - 1); 2.0625 bits per weight; element order of Q2_K. Quantizers use q = 0, 1, 2 only."""

    layout = np.dtype(
        [
            ("qs", "u1", 64),  #   0  256 numbers of 2 bits
            ("d", "<f2"),  #      64  scale
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        q = fields(blocks["qs"], 32, 2).reshape(out.shape).view(np.int8) - np.int8(1)
        np.multiply(scale(blocks["d"]), q, out=out)


class Q1_0(BlockFormat, type=GGMLType.Q1_0):
    """x = d where the bit is set, -d where not; 1.125 bits per weight; bits in order, lowest first."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  magnitude
            ("qs", "u1", 16),  #  2  128 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(scale(blocks["d"]), 2 * bits(blocks["qs"]).view(np.int8) - np.int8(1), out=out)


class Q2_0(BlockFormat, type=GGMLType.Q2_0):
    """x = d (q - 1); 2.25 bits per weight; four weights in a byte, in order, lowest bits first."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("qs", "u1", 16),  #  2  64 numbers of 2 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        q = fields(blocks["qs"], 1, 2).reshape(out.shape).view(np.int8) - np.int8(1)
        np.multiply(scale(blocks["d"]), q, out=out)
