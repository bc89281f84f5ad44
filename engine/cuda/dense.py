"""Products of many rows: weights expanded tile by tile to float16 and multiplied by cuBLAS on tensor cores.

Letters: T rows, K columns (inputs), N outputs. Products accumulate in float32; a float32 matrix stays float32.
Must not know of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.cuda.dequant import dequantize
from engine.cuda.repack import PackedMatrix
from engine.gguf.types import GGMLType

SCRATCH_BYTES = 64 << 20
"""Expanded weights in memory at once: large enough for full speed, small beside any model."""

_OP_N, _OP_T = 0, 1
_R_32F, _R_16F = 0, 2
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1
_ONE = np.ones(1, np.float32)
_ZERO = np.zeros(1, np.float32)


class DenseProduct:
    """out = alpha * x @ W.T (or out += ...) for packed matrices; owns the scratch memory of expanded weights."""

    def __init__(self) -> None:
        import cupy

        self._scratch = cupy.empty(SCRATCH_BYTES, cupy.uint8)

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        return int(self._scratch.nbytes)

    def __call__(
        self, matrix: PackedMatrix, x: Any, out: Any, *, alpha: float = 1.0, add: bool = False, second: Any = None
    ) -> None:
        """Multiplies T rows.

        Args:
            matrix: (N, K); a paired matrix gives gate in out and up in second.
            x: (T, K) contiguous, float16; float32 where the matrix is F32.
            out: float32 (T, >= N), row stride free; with a paired matrix the gate's (T, N).
            alpha: factor of the product.
            add: add to out.
            second: float32 (T, >= N), the up projection of a paired matrix.
        """
        import cupy

        wide = matrix.type is GGMLType.F32
        dtype = cupy.dtype(cupy.float32 if wide else cupy.float16)
        assert x.dtype == dtype and x.flags.c_contiguous and x.shape[1] == matrix.columns
        step = 8 if matrix.paired else 16
        copies = 2 if matrix.paired else 1
        most = max(step, SCRATCH_BYTES // (matrix.columns * dtype.itemsize * copies) // step * step)
        for first in range(0, matrix.rows, most):
            rows = min(most, matrix.rows - first)
            shape = (copies, rows, matrix.columns) if matrix.paired else (rows, matrix.columns)
            count = copies * rows * matrix.columns
            tile = self._tile(count, dtype).reshape(shape)
            dequantize(matrix, tile, first_row=first, rows=rows)
            pairs = [(tile[0], out), (tile[1], second)] if matrix.paired else [(tile, out)]
            for weights, target in pairs:
                self._gemm(weights, x, target[:, first : first + rows], alpha, add, wide)

    def _tile(self, count: int, dtype: Any) -> Any:
        import cupy

        if count * dtype.itemsize > self._scratch.nbytes:  # a single step of rows wider than the scratch memory
            return cupy.empty(count, dtype)
        return self._scratch[: count * dtype.itemsize].view(dtype)

    def _gemm(self, weights: Any, x: Any, out: Any, alpha: float, add: bool, wide: bool) -> None:
        """Row-major out (T, N) is column-major (N, T) to cuBLAS: W transposed times x."""
        import cupy
        from cupy_backends.cuda.libs import cublas

        handle = cupy.cuda.device.get_cublas_handle()
        cublas.setStream(handle, cupy.cuda.get_current_stream().ptr)
        n, k = weights.shape
        factor = np.array([alpha], np.float32)
        beta = _ONE if add else _ZERO
        kind = _R_32F if wide else _R_16F
        cublas.gemmEx(
            handle,
            _OP_T,
            _OP_N,
            n,
            x.shape[0],
            k,
            factor.ctypes.data,
            weights.data.ptr,
            kind,
            k,
            x.data.ptr,
            kind,
            k,
            beta.ctypes.data,
            out.data.ptr,
            _R_32F,
            out.strides[0] // 4,
            _COMPUTE_32F,
            _GEMM_DEFAULT,
        )
