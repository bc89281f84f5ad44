"""Packing on the GPU: GGUF bytes of a matrix in device memory become the layout the matrix kernels read.

Owns PackedMatrix and the launchers of repack.cu. Must not know of models or of where the bytes came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.formats.layouts import LAYOUTS, Layout, packed_bytes, tile_count
from engine.gguf.types import GGMLType, row_bytes

_FILES = ("formats.cuh", "formats_coded.cuh", "repack.cu")
_WARPS = 8


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix in its packed layout.

    Attributes:
        type: tensor type.
        rows: outputs N. A paired matrix holds gate and up, N rows each.
        columns: inputs K.
        data: uint8 (packed_bytes,), on the device, 16-byte aligned.
        scale: float32 (2,): what every weight is to be multiplied by, and its inverse; None where that is 1.
        paired: each tile is 8 gate rows over the 8 up rows of the same outputs.
    """

    type: GGMLType
    rows: int
    columns: int
    data: DeviceArray
    scale: DeviceArray | None = None
    paired: bool = False

    @property
    def layout(self) -> Layout:
        """Sizes of its chunks."""
        return LAYOUTS[self.type]

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return tile_count(self.rows, paired=self.paired)


def build_job(type: GGMLType) -> tuple[tuple[str, ...], dict[str, object]]:
    """The (files, defines) pair of the packing kernels of a type, for compiler.prebuild."""
    return _FILES, {"FORMAT": type.name}


def repack(
    raw: DeviceArray,
    type: GGMLType,
    rows: int,
    columns: int,
    *,
    partner: DeviceArray | None = None,
    out: DeviceArray | None = None,
    stream: Stream | None = None,
) -> PackedMatrix:
    """Packs a matrix. The GGUF bytes may be overwritten or freed once the stream has passed this point.

    Args:
        raw: uint8, contiguous, rows * row_bytes(type, columns) bytes on the device, rows first to last. Rows of a
            larger tensor are a slice of its bytes.
        type: tensor type, one of LAYOUTS.
        rows: N.
        columns: K, a multiple of the type's block size.
        partner: as raw, for the `up` matrix when raw is `gate`: the result is paired, for MatVec's gated activation.
        out: uint8 (packed_bytes(type, rows, columns, paired=...),), allocated when left out.
        stream: a CuPy stream; the current one when left out.

    Returns:
        PackedMatrix; its data is `out`.
    """
    import cupy

    paired = partner is not None
    layout = LAYOUTS[type]
    n_bytes = packed_bytes(type, rows, columns, paired=paired)
    sources = (raw,) if partner is None else (raw, partner)
    for source in sources:
        assert source.dtype == cupy.uint8
        assert source.size == rows * row_bytes(type, columns), "raw bytes of the matrix"
    with stream or cupy.cuda.get_current_stream():
        if out is None:
            out = cupy.empty(n_bytes, cupy.uint8)
        assert out.dtype == cupy.uint8
        assert out.size == n_bytes
        assert out.data.ptr % 16 == 0
        module = build(_FILES, defines={"FORMAT": type.name})
        scale = None
        if layout.scaled:
            largest = cupy.zeros(1, cupy.uint32)
            scale = cupy.empty(2, cupy.float32)
            kernel = module.get(f"largest_{type.name}")
            for source in sources:
                count = source.size // type.type_size
                launch(kernel, min(2048, -(-count // 256)), 256, (source, _i64(count), largest), pdl=False)
            launch(module.get(f"choose_scale_{type.name}"), 1, 1, (largest, scale), pdl=False)
        chunks = layout.chunks(columns)
        total = tile_count(rows, paired=paired) * chunks
        launch(
            module.get(f"repack_{type.name}"),
            min(65535, -(-total // _WARPS)),
            _WARPS * 32,
            (raw, partner, out, scale, rows, columns, _i64(row_bytes(type, columns)), chunks, _i64(total)),
            pdl=False,
        )
    return PackedMatrix(type, rows, columns, out, scale, paired)


def _i64(value: int) -> np.int64:
    """A 64-bit kernel argument."""
    return np.int64(value)
