"""Random packed rows of every tensor type, and the measure of a product's error."""

import numpy as np

from engine.cuda.formats.layouts import LAYOUTS
from engine.gguf.quants import FORMATS, row_bytes
from engine.gguf.types import GGMLType
from tests.support.models.gguf_builder import random_blocks

TYPES = list(LAYOUTS)
COMMON = TYPES[: TYPES.index(GGMLType.Q6_K) + 1]
RARE = [GGMLType[n] for n in ("IQ1_M", "IQ2_XS", "IQ3_S", "IQ4_XS", "MXFP4", "NVFP4", "Q2_0", "Q8_K", "TQ1_0")]
"""One each of the other formats that are packed alike, for kernels that take long to build."""
OTHER_SCALES = {GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.IQ1_M, GGMLType.MXFP4, GGMLType.NVFP4}
"""Types whose scale is no float16 of its own."""


def random_rows(rng, type, rows, columns):
    """Packed rows with random quants and scales."""
    if type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        values = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
        if type == GGMLType.F32:
            return values.view(np.uint8)
        if type == GGMLType.F16:
            return values.astype(np.float16).view(np.uint8)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if type in OTHER_SCALES:
        return random_blocks((rows, columns), type, std=0.05, seed=int(rng.integers(1 << 30)))
    raw = rng.integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8)
    blocks = raw.reshape(-1).view(FORMATS[type].layout)
    for name in blocks.dtype.names:
        if blocks.dtype[name].base == np.float16:
            blocks[name] = (rng.standard_normal(blocks[name].shape) * 0.01).astype(np.float16)
    return raw


def nmse(found, x, weights, factor=1.0):
    """Squared error over what the square of the product is expected to be, which random cancellation does not move."""
    error = found.astype(np.float64) - factor * (x @ weights.T)
    return float(np.sum(error**2) / np.sum((x**2) @ (weights**2).T) / factor**2)


def packed(cupy, type, raw, columns, partner=None):
    from engine.cuda.formats.repack import repack

    other = None if partner is None else cupy.asarray(partner.reshape(-1))
    return repack(cupy.asarray(raw.reshape(-1)), type, len(raw), columns, partner=other)


def operand_rows(room, pitch, columns):
    """Rows of an operand as float16, (pitch, columns), by the layout that operand.cu describes."""
    blocks = room.view(np.float16).reshape(-1, pitch, 8, 8)
    rows, found = np.arange(pitch), np.empty((pitch, columns), np.float16)
    for column in range(columns):
        inside = column % 16
        place = 2 * (inside >> 2) + ((inside & 3) >> 1) + 8 * (inside & 1)
        unit = (column % 64) // 16 * 2 + place // 8
        found[:, column] = blocks[column // 64, rows, unit ^ (rows & 7), place % 8]
    return found
