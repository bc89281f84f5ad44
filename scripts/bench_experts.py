"""Kernel lab of a layer's experts for many rows: rows that share experts, and rows sorted as in prompts.

    python -m scripts.bench_experts                        Qwen3-30B-A3B: 8 of 128 experts of 768 x 2048
    python -m scripts.bench_experts --rows 64 256 --grouped

Random packed bytes; gate and up Q4_K, down Q4_K and Q6_K in turn, eight layers in one graph; rows choose at random. A
time, in microseconds a layer, is the median of replays. Bytes: of the experts that some row chooses, once, over the
read bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import cupy
import numpy as np

from engine.cuda.experts import moe_rows, prefill
from engine.cuda.experts.moe_rows import RowExperts
from engine.cuda.experts.prefill import StackedExperts
from engine.cuda.experts.router import KernelRouting
from engine.cuda.matrix.gemm import Gemm
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.types import GGMLType as T
from scripts.bench_matvec import capture, milliseconds, random_matrix, read_bandwidth

ACTIVATION = KernelActivation.SILU
LAYERS = 8


class Layers:
    """Experts of some layers and what rows they get."""

    def __init__(self, experts: int, used: int, width: int, columns: int, types: Sequence[T]) -> None:
        self.routing, self.width, self.columns = KernelRouting(experts, used), width, columns
        self.stacks = [
            (
                random_matrix(T.Q4_K, experts * width, columns, paired=True),
                random_matrix(types[i % len(types)], experts * columns, width),
            )
            for i in range(LAYERS)
        ]
        self.rng = np.random.default_rng(0)

    def inputs(self, rows: int) -> tuple[cupy.ndarray, list[cupy.ndarray], float]:
        """Rows, scores of each layer, and bytes a layer reads."""
        x = cupy.random.standard_normal((rows, self.columns), dtype=np.float32)
        scores = [self.rng.standard_normal((rows, self.routing.n_experts)).astype(np.float32) for _ in self.stacks]
        n_bytes = 0.0
        for score, stack in zip(scores, self.stacks, strict=True):
            chosen = np.unique(np.argsort(-score, axis=1)[:, : self.routing.n_used]).size
            n_bytes += chosen / self.routing.n_experts * sum(m.data.nbytes for m in stack)
        return x, [cupy.asarray(score) for score in scores], n_bytes / LAYERS

    def shared(self, rows: int, x: cupy.ndarray, scores: list[cupy.ndarray]) -> Callable[[], None]:
        """The launches of moe_rows.py."""
        products = [RowExperts(*stack, self.routing, ACTIVATION) for stack in self.stacks]
        size = moe_rows.room_bytes(rows, self.routing, self.width, self.columns)
        room, out = cupy.zeros(size, np.uint8), cupy.zeros_like(x)
        norm = cupy.ones(self.columns, np.float32)

        def run() -> None:
            for product, score in zip(products, scores, strict=True):
                product(x, score, room, out, norm=norm, eps=1e-6)

        return run

    def grouped(self, rows: int, x: cupy.ndarray, scores: list[cupy.ndarray]) -> Callable[[], None]:
        """The launches of prefill.py."""
        gemm = Gemm([T.Q4_K, T.Q6_K], ACTIVATION)
        experts = [StackedExperts(MatrixGroup([up]), MatrixGroup([down]), self.routing) for up, down in self.stacks]
        size = prefill.room_bytes(rows, self.routing, self.width, self.columns)
        room, out = cupy.zeros(size, np.uint8), cupy.zeros_like(x)
        norm = cupy.ones(self.columns, np.float32)

        def run() -> None:
            for one, score in zip(experts, scores, strict=True):
                prefill.run(one, gemm, x, score, room, out=out, norm=norm, eps=1e-6)

        return run


def layer_time(run: Callable[[], None]) -> float:
    """Microseconds a layer."""
    graph, stream = capture(run)
    return milliseconds(graph, stream) * 1e3 / LAYERS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time a layer's experts for many rows on a GPU.")
    parser.add_argument("--experts", type=int, nargs=4, default=[128, 8, 768, 2048], help="count, used, F, D")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 80, 96, 128, 192, 256])
    parser.add_argument("--grouped", action="store_true", help="as prompts, too")
    parser.add_argument("--down", type=lambda names: [T[n] for n in names.split(",")], default=[T.Q4_K, T.Q6_K])
    args = parser.parse_args()
    count, used, width, columns = args.experts
    layers, ceiling = Layers(count, used, width, columns, args.down), read_bandwidth()
    for rows in args.rows:
        x, scores, n_bytes = layers.inputs(rows)
        cells = [f"{rows:4} rows: bytes {n_bytes / ceiling / 1e3:.0f}"]
        cells.append(f"shared {layer_time(layers.shared(rows, x, scores)):.1f}")
        if args.grouped:
            cells.append(f"as prompts {layer_time(layers.grouped(rows, x, scores)):.1f}")
        print(", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
