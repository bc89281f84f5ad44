"""Block formats decoded one weight at a time, for the types that the gguf package cannot decode.

Written from the formats' descriptions and kept apart from the engine's code: what is slow and plain here is the truth
that engine/gguf is compared with.
"""

import struct
from collections.abc import Callable

import numpy as np

from engine.gguf.types import GGMLType

Block = tuple[float, list[int]]
"""A block's scale and its numbers."""


def _q8_1(block: bytes) -> Block:
    d, _sum, *numbers = struct.unpack("<ff32b", block)
    return d, numbers


def _q8_k(block: bytes) -> Block:
    d, *numbers = struct.unpack_from("<f256b", block)
    return d, numbers


def _q1_0(block: bytes) -> Block:
    (d,) = struct.unpack_from("<e", block)
    return d, [1 if block[2 + i // 8] >> i % 8 & 1 else -1 for i in range(128)]


def _q2_0(block: bytes) -> Block:
    (d,) = struct.unpack_from("<e", block)
    return d, [(block[2 + i // 4] >> 2 * (i % 4) & 3) - 1 for i in range(64)]


_BLOCKS: dict[GGMLType, Callable[[bytes], Block]] = {
    GGMLType.Q8_1: _q8_1,
    GGMLType.Q8_K: _q8_k,
    GGMLType.Q1_0: _q1_0,
    GGMLType.Q2_0: _q2_0,
}
_PLAIN = {GGMLType.F64: "<f8", GGMLType.I8: "i1", GGMLType.I16: "<i2", GGMLType.I32: "<i4", GGMLType.I64: "<i8"}

TYPES = (*_BLOCKS, *_PLAIN)


def decode(raw: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """Packed rows, uint8 (..., bytes), to float32 (..., elements): the product of scale and number, rounded once."""
    if ggml_type in _PLAIN:
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(raw).view(_PLAIN[ggml_type]).astype(np.float32)
    size, data = ggml_type.type_size, raw.tobytes()
    blocks = [_BLOCKS[ggml_type](data[at : at + size]) for at in range(0, len(data), size)]
    scales = np.array([d for d, _ in blocks], np.float64).astype(np.float32)
    with np.errstate(all="ignore"):
        x = scales[:, None] * np.array([numbers for _, numbers in blocks], np.float32)
    return x.reshape(*raw.shape[:-1], -1)
