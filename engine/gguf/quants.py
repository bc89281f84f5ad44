"""What the packed bytes of a tensor mean: all block formats, by tensor type.

Each format is one class with its byte layout and its numpy dequantization, in one of the modules of formats/; a new one
is one more class (and, in a new module, one import here). The classes do, operation for operation in float32, what
ggml's reference does, so results are equal bit for bit. Sizes come from types.py.
Formats: ggml's ggml-common.h (block layouts) and ggml-quants.c (dequantize_row_*).
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from engine.gguf.formats import (  # noqa: F401 - imported for the formats that they register
    fp4_quants,
    i_quants,
    k_quants,
    low_bit_quants,
    simple_quants,
)
from engine.gguf.formats.block_format import BlockFormat, registry
from engine.gguf.types import REMOVED_TYPES, GGMLType, row_bytes

__all__ = ["FORMATS", "REMOVED_TYPES", "BlockFormat", "GGMLType", "dequantize", "row_bytes"]

FORMATS: Mapping[GGMLType, type[BlockFormat]] = MappingProxyType(dict(sorted(registry.items())))
"""Every format: one for each member of GGMLType."""


def dequantize(raw: np.ndarray, type: GGMLType) -> np.ndarray:
    """Decode packed rows of any format: uint8 (..., bytes) to float32 (..., elements).

    Raises:
        ValueError: the shape does not fit the type.
    """
    return FORMATS[type].dequantize(raw)
