"""Kernel lab of prompt products: TFLOP/s of every shape of a model, beside expanded weights and cuBLAS.

Usage:
    python -m scripts.bench_gemm                                  8B and 1B, 512, 2048 and 4096 rows, the chosen tiles
    python -m scripts.bench_gemm --models 1b --rows 64 --all      every tile shape of the kernel
Weights are valid random Q4_K and Q6_K blocks, three copies in turn, x is normally distributed. A time is the median of
graph replays (cuBLAS: of plain launches, as CuPy cannot capture it) divided by the launches. "layer" is one
layer's products with what makes their operands; the roof is what cuBLAS reaches with a large float16 matrix product on
the same card.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cupy
import numpy as np

from engine.cuda.driver import compiler
from engine.cuda.formats import repack
from engine.cuda.formats.dequant import build_jobs as dequant_jobs
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix import gemm_plan
from engine.cuda.matrix.dense import DenseProduct
from engine.cuda.matrix.gemm import Gemm, Operand, make_operand
from engine.cuda.matrix.gemm_plan import TILES, Tile, choose_tile, operand_bytes
from engine.cuda.matrix.matvec import MatVec
from engine.cuda.rows import rows
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import FORMATS, row_bytes
from engine.gguf.types import GGMLType as T

Q4, Q6 = T.Q4_K, T.Q6_K
MODELS: dict[str, dict[str, tuple[list[tuple[T, int]], int, bool]]] = {
    "8b": {
        "attn_qkv": ([(Q4, 4096), (Q4, 1024), (Q6, 1024)], 4096, False),
        "attn_output": ([(Q4, 4096)], 4096, False),
        "ffn_gate_up": ([(Q4, 14336)], 4096, True),
        "ffn_down": ([(Q6, 4096)], 14336, False),
    },
    "1b": {
        "attn_qkv": ([(Q4, 2048), (Q4, 512), (Q6, 512)], 2048, False),
        "attn_output": ([(Q4, 2048)], 2048, False),
        "ffn_gate_up": ([(Q4, 8192)], 2048, True),
        "ffn_down": ([(Q6, 2048)], 8192, False),
    },
}
COPIES = 3
LAUNCHES = 6


def random_matrix(rng: np.random.Generator, type: T, n: int, k: int, paired: bool) -> PackedMatrix:
    """Random quants with scales that give weights of ordinary size; a few rows, repeated."""
    some = rng.integers(0, 256, (16, row_bytes(type, k)), dtype=np.uint8)
    blocks = some.reshape(-1).view(FORMATS[type].layout)
    for name in blocks.dtype.names or ():
        if blocks.dtype[name].base == np.float16:
            blocks[name] = (rng.standard_normal(blocks[name].shape) * 1e-3).astype(np.float16)
    raw = cupy.tile(cupy.asarray(some.reshape(-1)), -(-n // 16))[: n * row_bytes(type, k)]
    return repack.repack(raw, type, n, k, partner=raw.copy() if paired else None)


def microseconds(work: Callable[[int], Any], *, graph: bool = True, repeats: int = 9) -> float:
    """Median time of one call, of LAUNCHES in a graph or one after the other."""
    stream = cupy.cuda.Stream(non_blocking=True)
    times = []
    with stream:
        for i in range(LAUNCHES):
            work(i)
        stream.synchronize()
        captured = None
        if graph:
            stream.begin_capture()
            for i in range(LAUNCHES):
                work(i)
            captured = stream.end_capture()
        for _ in range(repeats + 1):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            if captured is not None:
                captured.launch(stream)
            else:
                for i in range(LAUNCHES):
                    work(i)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) / LAUNCHES * 1e3)
    return float(statistics.median(times[1:]))


def roof(size: int = 8192) -> float:
    """TFLOP/s of a float16 matrix product by cuBLAS, random data."""
    a = cupy.random.standard_normal((size, size), dtype=np.float32).astype(np.float16)
    out = cupy.empty((size, size), np.float16)
    return 2 * size**3 / microseconds(lambda _: cupy.matmul(a, a, out=out), graph=False) / 1e6


class Case:
    """One product of one model with t rows, both ways."""

    def __init__(self, name: str, model: str, t: int, products: Gemm, dense: DenseProduct) -> None:
        matrices, self.k, self.paired = MODELS[model][name]
        rng = np.random.default_rng(5)
        self.groups = [
            MatVec([random_matrix(rng, type, n, self.k, self.paired) for type, n in matrices]) for _ in range(COPIES)
        ]
        self.n, self.t = sum(n for _, n in matrices), t
        self.flops = 2.0 * t * self.n * self.k * (2 if self.paired else 1)
        self._products, self._dense = products, dense
        self.add = name in ("attn_output", "ffn_down")
        self.x = cupy.random.standard_normal((t, self.k), dtype=np.float32)
        self._room = cupy.empty(operand_bytes(t, self.k), cupy.uint8)
        self._operand = make_operand(self.x, self._room)
        self._half = self.x.astype(np.float16)
        self._out, self._up = (cupy.zeros((t, self.n), np.float32) for _ in range(2))
        self._hidden = cupy.empty(operand_bytes(t, self.n), cupy.uint8)
        self.tile = choose_tile(sum(-(-m.tiles // 4) for m in self.groups[0].matrices), t, self.k, _multiprocessors())

    def fused(self, i: int, tile: Tile | None = None) -> None:
        """From packed weights; gate and up give the operand of the next product."""
        group = self.groups[i % COPIES]
        if self.paired:
            self._products.gated(group, self._operand, self._hidden, tile=tile)
        else:
            self._products(group, self._operand, self._out, add=self.add, tile=tile)

    def expanded(self, i: int) -> None:
        """Expanded tiles and cuBLAS, with the activation in a kernel of its own."""
        column = 0
        for matrix in self.groups[i % COPIES].matrices:
            out = self._out[:, column : column + matrix.rows]
            self._dense(matrix, self._half, out, rows=self.t, add=self.add, second=self._up if self.paired else None)
            column += matrix.rows
        if self.paired:
            rows.gate(self._out, self._up, KernelActivation.SILU)

    def operand(self, _: int) -> Operand:
        """x as an operand (with a norm it is the same traffic)."""
        return make_operand(self.x, self._room)


def _multiprocessors() -> int:
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def run(model: str, t: int, products: Gemm, dense: DenseProduct, ceiling: float, every: bool) -> None:
    """One table."""
    print(f"\n{model}, {t} rows{' ' * 12} fused µs  TFLOP/s  % of roof   expanded µs  TFLOP/s   tile")
    total = other = flops = 0.0
    for name in MODELS[model]:
        case = Case(name, model, t, products, dense)
        a, b = microseconds(case.fused), microseconds(case.expanded, graph=False)
        make = microseconds(case.operand) if name != "ffn_down" else 0.0
        speed, tile = case.flops / a / 1e6, case.tile
        print(
            f"{name:12} {case.n * (2 if case.paired else 1):6} x {case.k:5} {a:9.1f} {speed:8.0f} "
            f"{100 * speed / ceiling:9.0f} % {b:12.1f} {case.flops / b / 1e6:8.0f}   {tile.groups * 64} x {tile.tokens}"
        )
        if every:
            tiles = [tile for tile in TILES if tile.tokens <= max(16, 2 * t)]
            times = [(microseconds(partial(case.fused, tile=tile)), tile) for tile in tiles]
            print("    " + "   ".join(f"{tile.groups * 64} x {tile.tokens}: {us:.1f}" for us, tile in times))
        total, other, flops = total + a + make, other + b + make, flops + case.flops
    print(
        f"{'layer':28} {total:9.1f} {flops / total / 1e6:8.0f} {100 * flops / total / 1e6 / ceiling:9.0f} % "
        f"{other:12.1f} {flops / other / 1e6:8.0f}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="TFLOP/s of prompt products.")
    parser.add_argument("--models", default="8b,1b")
    parser.add_argument("--rows", default="512,2048,4096")
    parser.add_argument("--all", action="store_true", help="every tile shape")
    args = parser.parse_args(arguments)
    jobs: list[Any] = [*gemm_plan.build_jobs([Q4, Q6], KernelActivation.SILU), (rows.FILES, None)]
    jobs += [job for type in (Q4, Q6) for job in (repack.build_job(type), *dequant_jobs(type))]
    compiler.prebuild(jobs, compiler.device_arch())
    ceiling = roof()
    print(f"cuBLAS, float16 8192 x 8192 x 8192: {ceiling:.0f} TFLOP/s")
    products, dense = Gemm([Q4, Q6], KernelActivation.SILU), DenseProduct()
    for model in args.models.split(","):
        for t in map(int, args.rows.split(",")):
            run(model, t, products, dense, ceiling, args.all)


if __name__ == "__main__":
    main()
