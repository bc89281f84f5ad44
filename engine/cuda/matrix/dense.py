"""Products of many rows: weights expanded tile by tile to float16 and multiplied by cuBLAS on tensor cores.

For cards and types that gemm.py does not serve. Letters: T rows, K columns (inputs), N outputs. Products accumulate in
float32; a float32 matrix stays float32. Must not know of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.formats.dequant import dequantize
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.dense_plan import FIXED_OUTPUTS, PIECE, SCRATCH_BYTES, expansions, padded
from engine.gguf.types import GGMLType

_OP_N, _OP_T = 0, 1
_R_32F, _R_16F = 0, 2
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1
_ONE = np.ones(1, np.float32)
_ZERO = np.zeros(1, np.float32)


class DenseProduct:
    """out = alpha * x @ W.T (or out += ...) for packed matrices; owns the scratch memory of expanded weights.

    Args:
        fixed_rows: multiply PIECE rows at a time, however few there are: so a row's bits do not depend on the others.
    """

    def __init__(self, *, fixed_rows: bool = False) -> None:
        import cupy

        self.fixed_rows = fixed_rows
        self._scratch = cupy.empty(SCRATCH_BYTES, cupy.uint8)
        self._piece = cupy.empty((PIECE, FIXED_OUTPUTS), cupy.float32) if fixed_rows else None

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        return int(self._scratch.nbytes) + (0 if self._piece is None else int(self._piece.nbytes))

    def __call__(
        self,
        matrix: PackedMatrix,
        x: DeviceArray,
        out: DeviceArray,
        *,
        rows: int,
        alpha: float = 1.0,
        add: bool = False,
        second: DeviceArray | None = None,
    ) -> None:
        """Multiplies T rows.

        Args:
            matrix: (N, K); a paired matrix gives gate in out and up in second.
            x: (T, K) contiguous, float16; float32 where the matrix is F32. With fixed_rows (padded(T), K).
            out: float32 (T, >= N), row stride free; with a paired matrix the gate's (T, N).
            rows: T.
            alpha: factor of the product.
            add: add to out.
            second: float32 (T, >= N), the up projection of a paired matrix.
        """
        import cupy

        wide = matrix.type is GGMLType.F32
        dtype = cupy.dtype(cupy.float32 if wide else cupy.float16)
        assert x.dtype == dtype and x.flags.c_contiguous and x.shape[1] == matrix.columns
        assert x.shape[0] == (padded(rows) if self.fixed_rows else rows)
        copies = 2 if matrix.paired else 1
        for first, outputs in expansions(
            matrix.type, matrix.rows, matrix.columns, paired=matrix.paired, fixed_rows=self.fixed_rows
        ):
            shape = (copies, outputs, matrix.columns) if matrix.paired else (outputs, matrix.columns)
            tile = self._tile(copies * outputs * matrix.columns, dtype).reshape(shape)
            dequantize(matrix, tile, first_row=first, rows=outputs)
            pairs = [(tile, out)]
            if matrix.paired:
                assert second is not None
                pairs = [(tile[0], out), (tile[1], second)]
            for weights, target in pairs:
                self._multiply(weights, x, target[:rows, first : first + outputs], alpha, add, wide)

    def _multiply(
        self, weights: DeviceArray, x: DeviceArray, out: DeviceArray, alpha: float, add: bool, wide: bool
    ) -> None:
        if self._piece is None:
            self._gemm(weights, x, out, alpha, add, wide)
            return
        piece = self._piece[:, : weights.shape[0]]
        for first in range(0, len(out), PIECE):
            target = out[first : first + PIECE]
            if add:
                _copy(target, piece)
            self._gemm(weights, x[first : first + PIECE], piece, alpha, add, wide)
            _copy(piece[: len(target)], target)

    def _tile(self, count: int, dtype: np.dtype[Any]) -> DeviceArray:
        import cupy

        if count * dtype.itemsize > self._scratch.nbytes:  # a single step of rows wider than the scratch memory
            wide: DeviceArray = cupy.empty(count, dtype)
            return wide
        scratch: DeviceArray = self._scratch
        return scratch[: count * dtype.itemsize].view(dtype)

    def _gemm(
        self, weights: DeviceArray, x: DeviceArray, out: DeviceArray, alpha: float, add: bool, wide: bool
    ) -> None:
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


def _copy(source: Any, target: Any) -> None:
    """The first rows of target = source, both float32 with free row strides."""
    import cupy

    runtime, (rows, columns) = cupy.cuda.runtime, source.shape
    runtime.memcpy2DAsync(
        target.data.ptr,
        target.strides[0],
        source.data.ptr,
        source.strides[0],
        4 * columns,
        rows,
        runtime.memcpyDeviceToDevice,
        cupy.cuda.get_current_stream().ptr,
    )
