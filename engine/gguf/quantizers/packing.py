"""The inverse of the bit helpers of block_format.py: small numbers into bytes."""

import numpy as np


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """4-bit numbers (n, 2 m) to bytes (n, m): the first half in the low halves, the second in the high halves."""
    half = q.shape[-1] // 2
    packed: np.ndarray = q[:, :half] | q[:, half:] << 4
    return packed


def pack_bits(bits: np.ndarray) -> np.ndarray:
    """Bits (..., 8 m) to bytes (..., m), lowest first."""
    return np.packbits(bits.astype(np.uint8), axis=-1, bitorder="little")


def pack_fields(q: np.ndarray, group: int, width: int) -> np.ndarray:
    """Numbers of `width` bits (n, m) to bytes (n, m * width / 8), uint8; block_format.fields reads them."""
    count = 8 // width
    parts = q.reshape(len(q), -1, count, group)
    packed = np.zeros((len(q), parts.shape[1], group), np.uint8)
    for i in range(count):
        packed |= parts[:, :, i] << np.uint8(i * width)
    return packed.reshape(len(q), -1)


def scaled(d: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Whole scales (n, groups) times d (n, 1), as float32 (n, groups, 1)."""
    return (d * whole.astype(np.float32))[:, :, None]
