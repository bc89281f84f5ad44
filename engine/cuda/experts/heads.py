"""Every head of a row times a matrix of its own, in one launch of a decode step (moe.cu).

Letters: T rows, H heads, K columns of a head's matrix, N its outputs. Must not know of models.
"""

from __future__ import annotations

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import device_arch
from engine.cuda.experts.moe import build_job, launch_down
from engine.cuda.experts.router import MAX_EXPERTS, KernelRouting
from engine.cuda.formats.layouts import LAYOUTS, TILE_ROWS
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.matvec_plan import Job
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType

_HEAD_WARPS = 4  # a head's matrix has few columns


class HeadProducts:
    """out[t, h] = W_h x[t, h]: every head of a row times a matrix of its own, all in one launch.

    It is the experts' second product with one expert for each pair of a row and a head.

    Args:
        matrix: (H * N, K), head after head, N a multiple of 16.
        heads: H.
        rows: most rows T of a call.
    """

    def __init__(self, matrix: PackedMatrix, heads: int, rows: int) -> None:
        import cupy

        assert not matrix.paired and matrix.rows % (heads * TILE_ROWS) == 0
        self.matrix = matrix
        self.heads = heads
        self._ids = cupy.asarray(np.tile(np.arange(heads, dtype=np.int32), rows).reshape(-1, 1))

    def __call__(self, x: DeviceArray, out: DeviceArray) -> None:
        """Multiplies: x float32 (T * H, K), out float32 (T * H, N), both contiguous and apart."""
        pairs, matrix = int(x.shape[0]), self.matrix
        assert x.shape[1] == matrix.columns and out.shape == (pairs, matrix.rows // self.heads)
        assert x.flags.c_contiguous and out.flags.c_contiguous and pairs <= self._ids.size
        job = head_job(matrix.type, self.heads, device_arch())
        routing = _one_of(self.heads)
        chosen = (self._ids[:pairs], None, None, 1.0, 1.0, None, 0)
        launch_down(matrix, routing, job, _HEAD_WARPS, chosen, x, None, out, add=False)


def can_multiply_heads(type: GGMLType, rows: int, heads: int) -> bool:
    """Whether HeadProducts takes matrices of a type with so many rows each."""
    return type in LAYOUTS and rows % TILE_ROWS == 0 and heads <= MAX_EXPERTS


def head_job(type: GGMLType, heads: int, arch: int) -> Job:
    """The (files, defines) pair of HeadProducts, for compiler.prebuild."""
    return build_job(type, KernelActivation.NONE, _one_of(heads), _HEAD_WARPS, arch)


def _one_of(heads: int) -> KernelRouting:
    return KernelRouting(heads, 1)
