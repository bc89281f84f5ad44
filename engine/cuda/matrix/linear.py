"""Packed matrices that share their input. Must not know what they mean, or which kernels multiply them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cuda.formats.repack import PackedMatrix


class MatrixGroup:
    """1 to 4 packed matrices with the same columns K; their outputs follow each other. A paired matrix is alone.

    Attributes:
        matrices: the matrices.
        columns: K.
        width: outputs of all of them.
        paired: whether the one matrix holds gate and up.
        n_bytes: packed size.
    """

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        assert 1 <= len(matrices) <= MAX_MATRICES
        assert len({m.columns for m in matrices}) == 1
        assert len(matrices) == 1 or not any(m.paired for m in matrices)
        self.matrices = tuple(matrices)
        self.columns = matrices[0].columns
        self.width = sum(m.rows for m in matrices)
        self.paired = matrices[0].paired
        self.n_bytes = sum(int(m.data.nbytes) for m in matrices)


MAX_MATRICES = 4
"""Of a group: what one launch takes."""
