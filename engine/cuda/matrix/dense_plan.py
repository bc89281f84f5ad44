"""How cuBLAS products (dense.py) expand their weights and cut their rows; needs no GPU. Letters: T rows, N outputs."""

from __future__ import annotations

from engine.gguf.types import GGMLType

SCRATCH_BYTES = 64 << 20
"""Expanded weights in memory at once: large enough for full speed, small beside any model."""

PIECE = 256
"""Rows of every call of cuBLAS where their number must not show: it chooses its algorithm, and with it the order of
sums, by the shape."""

FIXED_OUTPUTS = 8192


def padded(rows: int) -> int:
    """Rows of an operand that is multiplied in whole pieces."""
    return -(-rows // PIECE) * PIECE


def pieces(rows: int) -> int:
    """Calls of cuBLAS for so many rows, where it multiplies whole pieces."""
    return padded(rows) // PIECE


def expansions(
    type: GGMLType, rows: int, columns: int, *, paired: bool = False, fixed_rows: bool = False
) -> list[tuple[int, int]]:
    """(first output, outputs) of the parts of a matrix that are expanded at once.

    Args:
        type: of the matrix; float32 stays float32, all others become float16.
        rows: N. A paired matrix is expanded to N rows of gate and N of up.
        columns: K.
        paired: see above.
        fixed_rows: see DenseProduct.
    """
    item = 4 if type is GGMLType.F32 else 2
    step, copies = (8, 2) if paired else (16, 1)
    most = max(step, SCRATCH_BYTES // (columns * item * copies) // step * step)
    if fixed_rows:
        most = min(most, FIXED_OUTPUTS)
    return [(first, min(most, rows - first)) for first in range(0, rows, most)]


def operand_bytes(type: GGMLType, rows: int, columns: int, *, fixed_rows: bool) -> int:
    """Bytes of T rows of K columns as cuBLAS reads them for a matrix of a type."""
    return (padded(rows) if fixed_rows else rows) * columns * (4 if type is GGMLType.F32 else 2)


def scratch_bytes(*, fixed_rows: bool) -> int:
    """Memory that a DenseProduct holds: expanded weights, and one piece of results."""
    return SCRATCH_BYTES + (4 * PIECE * FIXED_OUTPUTS if fixed_rows else 0)
