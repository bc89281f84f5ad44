"""Four-bit floating-point formats with small floating-point scales.

Elements: OCP Microscaling Formats (MX) v1.0, E2M1 (one sign bit, two of exponent, one of mantissa). Both formats keep
twice the elements, which are whole numbers, and half the scales. block_format.py says what a format class is.
"""

import numpy as np

from engine.gguf.formats.block_format import BlockFormat, fields, nibbles
from engine.gguf.types import GGMLType

E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the value of each 4-bit number."""


def _e8m0_halved() -> np.ndarray:
    """Half of 2^(e - 127) for each byte e, float32 (256,); the smallest two are subnormal, 255 is not special."""
    return np.ldexp(np.float32(1), np.arange(256) - 128)


def _ue4m3_halved() -> np.ndarray:
    """Half of each scale of 4 exponent and 3 mantissa bits, float32 (256,); the upper bit is ignored, 0x7F means 0."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) / 2
    value[0x7F] = 0
    return value.astype(np.float32)


E8M0_HALVED = _e8m0_halved()
UE4M3_HALVED = _ue4m3_halved()


class MXFP4(BlockFormat, type=GGMLType.MXFP4):
    """x = 2^(e - 127) q, q in E2M1; 4.25 bits per weight; element order of Q4_0."""

    layout = np.dtype(
        [
            ("e", "u1"),  #       0  scale: an exponent
            ("qs", "u1", 16),  #  1  32 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(E8M0_HALVED[blocks["e"]][:, None], E2M1_DOUBLED[nibbles(blocks["qs"])], out=out)


class NVFP4(BlockFormat, type=GGMLType.NVFP4):
    """x = d q per 16 weights, d in unsigned E4M3, q in E2M1; 4.5 bits per weight.

    Each 8 bytes of qs hold 16 weights: 8 in the low halves, 8 in the high halves.
    """

    layout = np.dtype(
        [
            ("d", "u1", 4),  #    0  4 scales
            ("qs", "u1", 32),  #  4  64 numbers of 4 bits
        ]
    )

    @classmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        x = out.reshape(-1, 4, 16)
        q = E2M1_DOUBLED[fields(blocks["qs"], 8, 4)].reshape(x.shape)
        np.multiply(UE4M3_HALVED[blocks["d"]][:, :, None], q, out=x)
