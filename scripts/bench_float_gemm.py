"""Kernel lab of products with float32 matrices: every shape of a block, beside cuBLAS in pieces of 256 rows.

    python -m scripts.bench_float_gemm                     routers and small projections at 2048 columns
    python -m scripts.bench_float_gemm --columns 4096 --rows 4096 --outputs 1 128

A time, in microseconds, is the median of graph replays divided by the launches (cuBLAS: of plain launches, as CuPy
cannot capture it, so that it is the host's time); x and weights are normally distributed, three copies in turn. "*" is
the shape that is chosen. The roof: three products of TF32 parts at the tensor cores' 495 TFLOP/s.
"""

from __future__ import annotations

import argparse
from functools import partial

import cupy
import numpy as np

from engine.cuda.formats.repack import repack
from engine.cuda.matrix.dense import DenseProduct
from engine.cuda.matrix.dense_plan import padded
from engine.cuda.matrix.float_gemm import SHAPES, Shape, choose_shape, multiply
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.matrix.matvec import MatVec
from engine.cuda.rows import rows as row_ops
from engine.gguf.types import GGMLType
from scripts.bench_gemm import COPIES, microseconds

TENSOR_FLOPS = 495e12
NORM_EPS = 1e-6


def case(outputs: int, columns: int, n: int, *, library: bool) -> None:
    """Prints one line."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((outputs, columns)).astype(np.float32) * np.float32(0.02)
    raw = cupy.asarray(weights.view(np.uint8).reshape(-1))
    matrices = [repack(raw, GGMLType.F32, outputs, columns) for _ in range(COPIES)]
    groups = [MatrixGroup([matrix]) for matrix in matrices]
    inputs = [cupy.random.standard_normal((padded(n), columns), dtype=np.float32) for _ in range(COPIES)]
    norm, out = cupy.ones(columns, np.float32), cupy.empty((n, outputs), np.float32)
    chosen = choose_shape(matrices[0].tiles, n, (90, 132))
    cells = []

    def run(shape: Shape, i: int) -> None:
        multiply(groups[i % COPIES], inputs[i % COPIES][:n], out, norm=norm, eps=NORM_EPS, shape=shape)

    for shape in SHAPES:
        mark = "*" if shape == chosen else ""
        cells.append(f"{shape.tiles}x{shape.rows}{mark} {microseconds(partial(run, shape)):.1f}")
    if n <= 64:
        few = [MatVec([matrix]) for matrix in matrices]
        time = microseconds(lambda i: few[i % COPIES](inputs[i % COPIES][:n], out, norm=norm, eps=NORM_EPS))
        cells.append(f"matvec {time:.1f}")
    if library:
        dense, operand = DenseProduct(fixed_rows=True), cupy.empty((padded(n), columns), np.float32)

        def old(i: int) -> None:
            row_ops.normalize(inputs[i % COPIES], operand, norm, NORM_EPS)
            dense(matrices[i % COPIES], operand, out, rows=n)

        cells.append(f"cuBLAS {microseconds(old, graph=False):.0f}")
    roof = 1e6 * 6 * n * columns * outputs / TENSOR_FLOPS
    print(f"{n:5} rows, {outputs:4} outputs: " + ", ".join(cells) + f"; roof {roof:.1f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time products with float32 matrices on a GPU.")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 64, 256, 512, 2048, 4096])
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 32, 64, 128, 256, 257])
    parser.add_argument("--library", action="store_true", help="cuBLAS too")
    args = parser.parse_args()
    for n in args.rows:
        for outputs in args.outputs:
            case(outputs, args.columns, n, library=args.library)


if __name__ == "__main__":
    main()
