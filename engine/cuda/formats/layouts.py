"""Packed layouts of matrices on the GPU: sizes only, so that a memory plan needs no GPU and no CuPy.

formats.cuh and formats_coded.cuh draw the bytes. A matrix is cut into tiles of 16 rows, a tile into chunks of
128 or 256 columns; a chunk takes what its GGUF blocks took, so only the last tile and the last chunk of a row are
padded. Must not know of kernels, models or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from engine.gguf.types import GGMLType

TILE_ROWS = 16


@dataclass(frozen=True)
class Layout:
    """How one tensor type is kept on the GPU.

    Attributes:
        type: the tensor type; its name is the struct in formats.cuh.
        chunk_columns: columns of one chunk.
        chunk_bytes: bytes of one chunk of 16 rows.
        scaled: kept times a power of two per matrix (BF16 as float16, F32 as two float16), its inverse beside it.
    """

    type: GGMLType
    chunk_columns: int
    chunk_bytes: int
    scaled: bool

    def chunks(self, columns: int) -> int:
        """Chunks of one tile of a matrix of so many columns."""
        return -(-columns // self.chunk_columns)


def _layout(type: GGMLType) -> Layout:
    columns = max(128, type.block_size)
    chunk_bytes = TILE_ROWS * columns // type.block_size * (type.type_size - _LEFT_OUT.get(type, 0))
    return Layout(type, columns, chunk_bytes, type in (GGMLType.BF16, GGMLType.F32))


_TYPES = (
    GGMLType.F32,
    GGMLType.F16,
    GGMLType.BF16,
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.Q8_0,
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.Q8_1,
    GGMLType.Q8_K,
    GGMLType.IQ1_S,
    GGMLType.IQ1_M,
    GGMLType.IQ2_XXS,
    GGMLType.IQ2_XS,
    GGMLType.IQ2_S,
    GGMLType.IQ3_XXS,
    GGMLType.IQ3_S,
    GGMLType.IQ4_NL,
    GGMLType.IQ4_XS,
    GGMLType.TQ1_0,
    GGMLType.TQ2_0,
    GGMLType.MXFP4,
    GGMLType.NVFP4,
    GGMLType.Q1_0,
    GGMLType.Q2_0,
)
_LEFT_OUT = {GGMLType.Q8_1: 4, GGMLType.Q8_K: 32}
"""Bytes of a block that no weight depends on: sums of its numbers, for products of another kind."""

LAYOUTS = MappingProxyType({type: _layout(type) for type in _TYPES})
"""Every tensor type the matrix kernels read."""


def kept_as(type: GGMLType) -> GGMLType:
    """The type a tensor has on the GPU: its own, or F32 for F64 and whole numbers, which are rounded on the way."""
    return type if type in LAYOUTS else GGMLType.F32


def tile_count(rows: int, *, paired: bool = False) -> int:
    """Tiles of a matrix of `rows` outputs; a paired one (gate and up) has two matrix rows per output."""
    return -(-rows // (TILE_ROWS // 2 if paired else TILE_ROWS))


def packed_bytes(type: GGMLType, rows: int, columns: int, *, paired: bool = False) -> int:
    """Bytes of the packed matrix (rows, columns); with paired, of two such matrices interleaved."""
    layout = LAYOUTS[type]
    return tile_count(rows, paired=paired) * layout.chunks(columns) * layout.chunk_bytes
