"""The K formats: super-blocks of 256 weights whose sub-block scales are themselves quantized.

block_format.py says what a format class is.
"""

import numpy as np

from engine.gguf.formats.block_format import BlockFormat, fields, scale
from engine.gguf.types import GGMLType


def scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the 12 bytes of Q4_K and Q5_K into 8 scales and 8 minima of 6 bits, (n, 8) each.

    With s0 … s7 the scales and m0 … m7 the minima, high bits first:
        bytes 0-3   s4[5:4] s0 | s5[5:4] s1 | s6[5:4] s2 | s7[5:4] s3
        bytes 4-7   m4[5:4] m0 | m5[5:4] m1 | m6[5:4] m2 | m7[5:4] m3
        bytes 8-11  m4[3:0] s4[3:0] | m5[3:0] s5[3:0] | m6[3:0] s6[3:0] | m7[3:0] s7[3:0]
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((a & 0x3F, (c & 0x0F) | (a >> 6 << 4)), axis=1)
    mins = np.concatenate((b & 0x3F, (c >> 4) | (b >> 6 << 4)), axis=1)
    return scales, mins


class Q2_K(BlockFormat, type=GGMLType.Q2_K):
    """x = d s q - dmin m per sub-block of 16; 2.625 bits per weight.

    Scale s and minimum m of sub-block i are the low and the high half of scales[i]. Each 32 bytes of qs hold 128
    elements: 32 in bits 0-1, the next 32 in bits 2-3, and so on.
    """

    layout = np.dtype(
        [
            ("scales", "u1", 16),  #   0  4-bit scale and 4-bit minimum of 16 sub-blocks
            ("qs", "u1", 64),  #      16  256 numbers of 2 bits
            ("d", "<f2"),  #          80  scale of the scales
            ("dmin", "<f2"),  #       82  scale of the minima
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        dl = scale(blocks["d"]) * (blocks["scales"] & 0x0F)
        ml = scale(blocks["dmin"]) * (blocks["scales"] >> 4)
        x = out.reshape(-1, 16, 16)
        np.multiply(dl[:, :, None], fields(blocks["qs"], 32, 2).reshape(x.shape), out=x)
        x -= ml[:, :, None]


class Q3_K(BlockFormat, type=GGMLType.Q3_K):
    """x = d (s - 32) (q - 4) per sub-block of 16; 3.4375 bits per weight.

    Low 2 bits of q in the order of Q2_K. The third bit of element 32 i + j is bit i of hmask[j].
    The scales have 6 bits: low 4 of s0 … s7 in the low halves of scales[0:8], of s8 … s15 in their high halves; the
    upper 2 of s(4 i + j) in bits 2 i and 2 i + 1 of scales[8 + j].
    """

    layout = np.dtype(
        [
            ("hmask", "u1", 32),  #    0  third bits
            ("qs", "u1", 64),  #      32  low 2 bits
            ("scales", "u1", 12),  #  96  16 scales of 6 bits
            ("d", "<f2"),  #         108  scale of the scales
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        n = len(blocks)
        low = fields(blocks["scales"][:, :8], 8, 4).reshape(n, 16)
        high = fields(blocks["scales"][:, 8:], 4, 2).reshape(n, 16)
        dl = scale(blocks["d"]) * ((low | high << 4).view(np.int8) - np.int8(32))
        q = fields(blocks["qs"], 32, 2).reshape(n, 256) | fields(blocks["hmask"], 32, 1).reshape(n, 256) << 2
        x = out.reshape(n, 16, 16)
        np.multiply(dl[:, :, None], (q.view(np.int8) - np.int8(4)).reshape(x.shape), out=x)


class Q4_K(BlockFormat, type=GGMLType.Q4_K):
    """x = d s q - dmin m per sub-block of 32; 4.5 bits per weight.

    Each 32 bytes of qs hold two sub-blocks: the first in the low halves, the second in the high halves.
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #           0  scale of the scales
            ("dmin", "<f2"),  #        2  scale of the minima
            ("scales", "u1", 12),  #   4  8 scales and 8 minima of 6 bits: scales_and_mins
            ("qs", "u1", 128),  #     16  256 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        scales, mins = scales_and_mins(blocks["scales"])
        x = out.reshape(-1, 8, 32)
        q = fields(blocks["qs"], 32, 4).reshape(x.shape)
        np.multiply((scale(blocks["d"]) * scales)[:, :, None], q, out=x)
        x -= (scale(blocks["dmin"]) * mins)[:, :, None]


class Q5_K(BlockFormat, type=GGMLType.Q5_K):
    """x = d s q - dmin m per sub-block of 32; 5.5 bits per weight.

    Low 4 bits in the order of Q4_K. The fifth bit of element 32 i + j is bit i of qh[j].
    """

    layout = np.dtype(
        [
            ("d", "<f2"),  #           0  scale of the scales
            ("dmin", "<f2"),  #        2  scale of the minima
            ("scales", "u1", 12),  #   4  8 scales and 8 minima of 6 bits: scales_and_mins
            ("qh", "u1", 32),  #      16  fifth bits
            ("qs", "u1", 128),  #     48  low 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        scales, mins = scales_and_mins(blocks["scales"])
        x = out.reshape(-1, 8, 32)
        q = fields(blocks["qs"], 32, 4).reshape(x.shape) | fields(blocks["qh"], 32, 1).reshape(x.shape) << 4
        np.multiply((scale(blocks["d"]) * scales)[:, :, None], q, out=x)
        x -= (scale(blocks["dmin"]) * mins)[:, :, None]


class Q6_K(BlockFormat, type=GGMLType.Q6_K):
    """x = d s (q - 32) per sub-block of 16; 6.5625 bits per weight.

    In two halves of 128 elements, each 64 bytes of ql and 32 of qh. Low 4 bits: the first 64 elements in the low
    halves of ql, the next 64 in the high halves. Upper 2 bits: each 32 elements one pair of bits of qh, lowest first.
    """

    layout = np.dtype(
        [
            ("ql", "u1", 128),  #       0  low 4 bits
            ("qh", "u1", 64),  #      128  upper 2 bits
            ("scales", "i1", 16),  #  192  16 scales of 8 bits, signed
            ("d", "<f2"),  #          208  scale of the scales
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        n = len(blocks)
        q = fields(blocks["ql"], 64, 4).reshape(n, 256) | fields(blocks["qh"], 32, 2).reshape(n, 256) << 4
        x = out.reshape(n, 16, 16)
        dl = scale(blocks["d"]) * blocks["scales"]
        np.multiply(dl[:, :, None], (q.view(np.int8) - np.int8(32)).reshape(x.shape), out=x)
