"""Launchers of embed.cu and dequant.cu: rows of a packed matrix as plain numbers.

Letters: B tokens, K columns, N rows. Must not know of models.
"""

from __future__ import annotations

from functools import cache

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import Kernel, build
from engine.cuda.driver.launch import launch
from engine.cuda.formats.repack import PackedMatrix
from engine.gguf.types import GGMLType

_EMBED_FILES = ("formats.cuh", "formats_coded.cuh", "embed.cu")
_DEQUANT_FILES = ("formats.cuh", "formats_coded.cuh", "dequant.cu")


def build_jobs(type: GGMLType) -> list[tuple[tuple[str, ...], dict[str, object]]]:
    """The (files, defines) pairs of both kernels for a type, for compiler.prebuild."""
    return [(_EMBED_FILES, {"FORMAT": type.name}), (_DEQUANT_FILES, {"FORMAT": type.name})]


def _device() -> int:
    import cupy

    return int(cupy.cuda.Device().id)


@cache
def _kernel(files: tuple[str, ...], name: str, type: GGMLType, device: int) -> Kernel:
    return build(files, defines={"FORMAT": type.name}).get(f"{name}_{type.name}")


def embed(
    matrix: PackedMatrix,
    token_ids: DeviceArray,
    out: DeviceArray,
    *,
    scale: float = 1.0,
    stream: Stream | None = None,
    pdl: bool = True,
) -> None:
    """out[b] = scale * row token_ids[b] of the matrix, exactly as the CPU dequantizes it (F32: 22 bits).

    Args:
        matrix: not paired; the head's own matrix where the file ties them.
        token_ids: int32 (B,); a row outside 0..N-1 gives zeros.
        out: float32 (B, K), rows contiguous.
        scale: factor (some models scale their embeddings).
        stream: a CuPy stream, may be under capture; the current one when left out.
        pdl: programmatic dependent launch; token_ids are read after the wait.
    """
    n = int(token_ids.size)
    assert not matrix.paired, "a paired matrix has no rows to look up"
    assert out.shape[0] >= n
    assert out.shape[1] == matrix.columns
    assert out.strides[1] == 4
    kernel = _kernel(_EMBED_FILES, "embed", matrix.type, _device())
    quads = -(-matrix.columns // 128)
    args = (matrix.data, matrix.scale, matrix.rows, matrix.columns, token_ids, out, out.strides[0] // 4, float(scale))
    launch(kernel, (n, -(-quads // 4)), 128, args, stream=stream, pdl=pdl)


def dequantize(
    matrix: PackedMatrix, out: DeviceArray, *, first_row: int = 0, rows: int | None = None, stream: Stream | None = None
) -> None:
    """Rows first_row .. first_row + rows - 1 as a row-major matrix, for a dense product.

    Args:
        matrix: any packed matrix.
        out: float16 or float32, contiguous: (rows, K), or (2, rows, K) for a paired matrix: gate, then up.
        first_row: a multiple of 16 (paired: of 8).
        rows: all that remain when left out.
        stream: a CuPy stream; the current one when left out.
    """
    import cupy

    rows = matrix.rows - first_row if rows is None else rows
    step = 8 if matrix.paired else 16
    assert first_row % step == 0
    assert 0 < rows <= matrix.rows - first_row
    assert out.flags.c_contiguous
    assert out.shape == ((2,) if matrix.paired else ()) + (rows, matrix.columns)
    suffix = {cupy.dtype("float16"): "half", cupy.dtype("float32"): "float"}[out.dtype]
    kernel = _kernel(_DEQUANT_FILES, f"dequant_{suffix}", matrix.type, _device())
    chunks = matrix.layout.chunks(matrix.columns)
    first_tile, tiles = first_row // step, -(-rows // step)
    args = (matrix.data, matrix.scale, out, first_tile, rows, matrix.columns, chunks, int(matrix.paired))
    launch(kernel, (chunks, tiles), 256, args, stream=stream, pdl=False)
