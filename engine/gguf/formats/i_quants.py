"""The IQ formats: super-blocks of 256 weights whose numbers are indices into a grid or a table of levels.

Grids and sign tables are in grids.py. block_format.py says what a format class is.
"""

import numpy as np

from engine.gguf.formats.block_format import BlockFormat, bits, fields, nibbles, scale
from engine.gguf.formats.grids import grid, signs_of_seven
from engine.gguf.types import GGMLType

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""The values of the 4-bit numbers of IQ4_NL and IQ4_XS: finer near zero."""

IQ1_DELTA = np.float32(0.125)
"""By how much IQ1_S and IQ1_M move a point of the grid up or down."""


def signed(points: np.ndarray, sign_bits: np.ndarray) -> np.ndarray:
    """Negate coordinates of points, int8 (n, ...), where sign_bits, uint8 with one byte per 8 of them, have a bit."""
    negative = bits(sign_bits.reshape(len(sign_bits), -1)).reshape(points.shape).view(np.int8)
    # -x is ~x + 1: no copy for the choice.
    points ^= -negative
    points += negative
    return points


def seven_bit_signs(packed: np.ndarray) -> np.ndarray:
    """Sign bytes (n, 8, 4) of the low 28 bits of numbers (n, 8), 7 bits each, lowest first."""
    shifts = np.arange(0, 28, 7, dtype=np.uint32)
    signs: np.ndarray = signs_of_seven()[packed[:, :, None] >> shifts & np.uint32(0x7F)]
    return signs


class IQ2_XXS(BlockFormat, type=GGMLType.IQ2_XXS):
    """x = d (s + 1/2) / 4 * point per 32 weights; 2.0625 bits per weight.

    A group of 8 bytes holds 32 weights: four indices into a grid of 256 points of 8 coordinates, then 32 bits: the
    signs of the four points, 7 bits each (grids.signs_of_seven), and in the upper 4 bits s.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #                                         0  scale
            ("groups", [("qs", "u1", 4), ("signs", "<u4")], 8),  #   2  8 x (4 indices, signs and scale)
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        packed = blocks["groups"]["signs"]
        x = signed(grid("IQ2_XXS")[blocks["groups"]["qs"]], seven_bit_signs(packed))
        dl = scale(blocks["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.25)
        np.multiply(dl[:, :, None], x.reshape(-1, 8, 32), out=out.reshape(-1, 8, 32))


class IQ2_XS(BlockFormat, type=GGMLType.IQ2_XS):
    """x = d (s + 1/2) / 4 * point per 16 weights; 2.3125 bits per weight.

    Each of qs is an index into a grid of 512 points of 8 coordinates (low 9 bits) and 7 bits of signs. The scales of
    two times 16 weights are the low and the high half of a byte.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #          0  scale
            ("qs", "<u2", 32),  #     2  indices and signs
            ("scales", "u1", 8),  #  66  16 scales of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        x = signed(grid("IQ2_XS")[blocks["qs"] & 511], signs_of_seven()[blocks["qs"] >> 9])
        _scale_sixteens(blocks, x, out)


def _scale_sixteens(blocks: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Multiply each 16 weights by d (s + 1/2) / 4."""
    four = fields(blocks["scales"], 1, 4).reshape(-1, 16)
    dl = scale(blocks["d"]) * (np.float32(0.5) + four) * np.float32(0.25)
    np.multiply(dl[:, :, None], x.reshape(-1, 16, 16), out=out.reshape(-1, 16, 16))


class IQ2_S(BlockFormat, type=GGMLType.IQ2_S):
    """x = d (s + 1/2) / 4 * point per 16 weights; 2.5625 bits per weight.

    Indices have 10 bits, into a grid of 1024 points of 8 coordinates: the upper 2 of index 4 i + j are bits 2 j and
    2 j + 1 of qh[i]. All signs are stored. Scales as in IQ2_XS.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #          0  scale
            ("qs", "u1", 32),  #      2  low 8 bits of 32 indices
            ("signs", "u1", 32),  #  34  256 signs, lowest bit first
            ("qh", "u1", 8),  #      66  upper 2 bits of the indices
            ("scales", "u1", 8),  #  74  16 scales of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        high = fields(blocks["qh"], 1, 2).reshape(-1, 32).astype(np.uint16)
        _scale_sixteens(blocks, signed(grid("IQ2_S")[blocks["qs"] | high << 8], blocks["signs"]), out)


class IQ3_XXS(BlockFormat, type=GGMLType.IQ3_XXS):
    """x = d (s + 1/2) / 2 * point per 32 weights; 3.0625 bits per weight.

    Indices go into a grid of 256 points of 4 coordinates, 8 of them for 32 weights; signs and s as in IQ2_XXS.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #          0  scale
            ("qs", "u1", 64),  #      2  64 indices
            ("signs", "<u4", 8),  #  66  signs (28 bits) and scale (4 bits) of 32 weights each
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        packed = blocks["signs"]
        x = signed(grid("IQ3_XXS")[blocks["qs"]], seven_bit_signs(packed))
        dl = scale(blocks["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.5)
        np.multiply(dl[:, :, None], x.reshape(-1, 8, 32), out=out.reshape(-1, 8, 32))


class IQ3_S(BlockFormat, type=GGMLType.IQ3_S):
    """x = d (2 s + 1) * point per 32 weights; 3.4375 bits per weight.

    Indices have 9 bits, into a grid of 512 points of 4 coordinates: the ninth of index 8 i + j is bit j of qh[i].
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #           0  scale
            ("qs", "u1", 64),  #       2  low 8 bits of 64 indices
            ("qh", "u1", 8),  #       66  ninth bits
            ("signs", "u1", 32),  #   74  256 signs, lowest bit first
            ("scales", "u1", 4),  #  106  8 scales of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        index = blocks["qs"] | bits(blocks["qh"]).astype(np.uint16) << 8
        x = signed(grid("IQ3_S")[index], blocks["signs"])
        dl = scale(blocks["d"]) * (1 + 2 * fields(blocks["scales"], 1, 4).reshape(-1, 8))
        np.multiply(dl[:, :, None], x.reshape(-1, 8, 32), out=out.reshape(-1, 8, 32))


class IQ1_S(BlockFormat, type=GGMLType.IQ1_S):
    """x = d (2 s + 1) (point ± 1/8) per 32 weights; 1.5625 bits per weight.

    Indices have 11 bits, into a grid of 2048 points of 8 coordinates. Of qh[i], for 32 weights: the upper 3 bits of
    four indices (lowest first), s (bits 12-14), and in bit 15 whether 1/8 is taken away.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #       0  scale
            ("qs", "u1", 32),  #   2  low 8 bits of 32 indices
            ("qh", "<u2", 8),  #  34  upper bits, scale and shift of 32 weights each
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        qh = blocks["qh"]
        high = qh[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
        points = grid("IQ1_S")[blocks["qs"] | high.reshape(-1, 32) << 8]
        delta = np.where(qh >> 15, -IQ1_DELTA, IQ1_DELTA)
        x = out.reshape(-1, 8, 32)
        np.add(points.reshape(x.shape), delta[:, :, None], out=x)
        x *= (scale(blocks["d"]) * (2 * (qh >> 12 & np.uint16(7)) + 1))[:, :, None]


class IQ1_M(BlockFormat, type=GGMLType.IQ1_M):
    """x = d (2 s + 1) (point ± 1/8); s per 16 weights, the shift per 8; 1.75 bits per weight.

    Grid of IQ1_S. Each half byte of qh, lowest first, has the upper 3 bits of one index and whether 1/8 is taken away.
    Each of the four numbers in scales has 4 times 3 bits of s, lowest first; their upper 4 bits are, from the first
    number's to the last one's, the float16 d from its lowest bits up.
    """

    layout = np.dtype(
        [
            ("qs", "u1", 32),  #       0  low 8 bits of 32 indices
            ("qh", "u1", 16),  #      32  upper bits and shifts
            ("scales", "<u2", 4),  #  48  16 scales of 3 bits, and d
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        packed = blocks["scales"]
        d = np.bitwise_or.reduce((packed >> 12) << np.arange(0, 16, 4, dtype=np.uint16), axis=1).view(np.float16)
        s = (packed[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)).reshape(-1, 16)
        four = fields(blocks["qh"], 1, 4).reshape(-1, 32)
        points = grid("IQ1_S")[blocks["qs"] | (four & 7).astype(np.uint16) << 8]
        x = out.reshape(-1, 32, 8)
        np.add(points, np.where(four >> 3, -IQ1_DELTA, IQ1_DELTA)[:, :, None], out=x)
        sixteens = out.reshape(-1, 16, 16)
        sixteens *= (scale(d) * (2 * s + 1))[:, :, None]


class IQ4_NL(BlockFormat, type=GGMLType.IQ4_NL):
    """x = d LEVELS[q]; 4.5 bits per weight; element order of Q4_0."""

    layout = np.dtype(
        [
            ("d", "<f2"),  #      0  scale
            ("qs", "u1", 16),  #  2  32 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(scale(blocks["d"]), LEVELS[nibbles(blocks["qs"])], out=out)


class IQ4_XS(BlockFormat, type=GGMLType.IQ4_XS):
    """x = d (s - 32) LEVELS[q] per 32 weights; 4.25 bits per weight.

    The scales have 6 bits: low 4 in the half bytes of scales_l, upper 2 in pairs of bits of scales_h, lowest first.
    Each 16 bytes of qs hold 32 weights: 16 in the low halves, 16 in the high halves.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #           0  scale of the scales
            ("scales_h", "<u2"),  #    2  upper 2 bits of 8 scales
            ("scales_l", "u1", 4),  #  4  low 4 bits
            ("qs", "u1", 128),  #      8  256 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        low = fields(blocks["scales_l"], 1, 4).reshape(-1, 8)
        high = (blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)).astype(np.uint8)
        dl = scale(blocks["d"]) * ((low | high << 4).view(np.int8) - np.int8(32))
        x = out.reshape(-1, 8, 32)
        np.multiply(dl[:, :, None], LEVELS[fields(blocks["qs"], 16, 4)].reshape(x.shape), out=x)
