"""What a block format is, and the few numpy helpers that formats share.

The formats themselves are in the modules *_quants.py beside it; others import them from engine/gguf/quants.py.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from engine.gguf.types import GGMLType

registry: dict[GGMLType, type["BlockFormat"]] = {}
"""Formats defined so far; quants.FORMATS is the complete, read-only one."""


class BlockFormat(ABC):
    """One block format. Not instantiated: a class is the format.

    Attributes:
        type: the tensor type it decodes.
        block_size: elements in a block.
        type_size: bytes in a block.
        layout: the fields of a block, packed, little-endian, in file order.
    """

    type: ClassVar[GGMLType]
    block_size: ClassVar[int]
    type_size: ClassVar[int]
    layout: ClassVar[np.dtype[Any]]

    def __init_subclass__(cls, type: GGMLType) -> None:
        """Register the class as the format of a tensor type."""
        cls.type = type
        cls.block_size = type.block_size
        cls.type_size = type.type_size
        assert cls.layout.itemsize == type.type_size, f"{type.name} layout takes {cls.layout.itemsize} bytes"
        registry[type] = cls

    @classmethod
    def dequantize(cls, raw: np.ndarray) -> np.ndarray:
        """Decode packed rows.

        Args:
            raw: uint8 (..., n_blocks * type_size), any leading shape.

        Returns:
            float32 (..., n_blocks * block_size), freshly allocated.

        Raises:
            ValueError: raw is not uint8 or its last dimension is not whole blocks.
        """
        if raw.dtype != np.uint8 or raw.ndim == 0 or raw.shape[-1] % cls.type_size:
            raise ValueError(
                f"{cls.type.name}: found {raw.dtype} {raw.shape}; "
                f"allowed: uint8 whose last dimension is a multiple of {cls.type_size}"
            )
        n_blocks = raw.shape[-1] // cls.type_size
        blocks = np.ascontiguousarray(raw).reshape(-1).view(cls.layout)
        out = np.empty((*raw.shape[:-1], n_blocks * cls.block_size), np.float32)
        if not out.size:
            return out
        # Scales may be infinite or NaN in a damaged file: the results are too, without a warning.
        with np.errstate(all="ignore"):
            cls._decode(blocks, out.reshape(blocks.shape[0], cls.block_size))
        return out

    @classmethod
    @abstractmethod
    def _decode(cls, blocks: np.ndarray, out: np.ndarray) -> None:
        """Decode blocks, a (n,) array of cls.layout, into out, float32 (n, block_size)."""


def scale(field: np.ndarray) -> np.ndarray:
    """Return a floating-point field (n,) as float32 (n, 1)."""
    return field.astype(np.float32)[:, None]


def nibbles(qs: np.ndarray) -> np.ndarray:
    """Split bytes (n, m) into 4-bit numbers (n, 2 m): the low halves of all bytes, then the high halves."""
    return np.concatenate((qs & 0x0F, qs >> 4), axis=-1)


def bits(qh: np.ndarray) -> np.ndarray:
    """Split bytes (n, m) into bits (n, 8 m), lowest first, as uint8."""
    return np.unpackbits(qh, axis=-1, bitorder="little")


def fields(qs: np.ndarray, group: int, width: int) -> np.ndarray:
    """Split bytes (n, m) into numbers of width bits: (n, m // group, 8 // width, group) as uint8.

    Each group of consecutive bytes holds its first `group` elements in the lowest bits, the next in the bits above.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return qs.reshape(len(qs), -1, 1, group) >> shifts & np.uint8((1 << width) - 1)
