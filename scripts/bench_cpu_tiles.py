"""Products of one core with many tokens, format by format and instruction set by instruction set.

    python -m scripts.bench_cpu_tiles --formats Q4_K,Q8_0 --instructions amx,vnni512

Weights are random bytes that lie in the cache. Instruction sets run by turns. Prints the best of all turns in 1e9
products (multiplications with their additions) a second of the thread's processor time, and whether all sets gave the
same bits.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from engine.cpu.kernels import processor
from engine.cpu.kernels.build import kernel
from engine.cpu.memory import array_address
from engine.cpu.products import integer
from engine.cpu.products.integer import IntegerWeights, empty_activations, form_of, n_items, quantize_operands
from engine.cpu.products.matmul import prepare
from engine.cpu.threads import ThreadPool
from engine.gguf import GGMLType, row_bytes
from engine.model.weights import Weight


def matrix(type: GGMLType, rows: int, columns: int) -> Weight:
    """Random weights, whose scales of 16 bits are finite."""
    raw = np.random.default_rng(0).integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8) & 0xBF
    return Weight("random", type, (rows, columns), raw.astype(np.uint8))


class Product:
    """One kernel of one instruction set with its operands."""

    def __init__(self, weights: IntegerWeights, w: Weight, x: np.ndarray, instructions: str) -> None:
        prepared = prepare(w)
        form = form_of(prepared.type, 8, "tile_panels", instructions)
        self._blocks = empty_activations(x.shape[0], x.shape[1], form)
        operands = np.array(quantize_operands(x, self._blocks, form), dtype=np.int64)
        kernel("quantize")(array_address(operands), 0, self._blocks.shape[0] * self._blocks.shape[1], 0)
        self.out = np.zeros((len(x), prepared.rows), np.float32)
        self._operands = np.array(weights.operands(self._blocks, prepared, self.out), dtype=np.int64)
        type_name = weights.kernel_type(prepared).replace(integer.instructions(), instructions)
        self._kernel = kernel("tile_panels", type_name)
        self._n_items = n_items("tile_panels", prepared)

    def seconds(self) -> float:
        """Processor time of one run."""
        start = time.thread_time()
        self._kernel(array_address(self._operands), 0, self._n_items, 0)
        return time.thread_time() - start


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    possible = ",".join(processor.usable(processor.host()))
    parser.add_argument("--formats", default="Q4_0,Q8_0,Q4_K,Q5_K,Q6_K,Q3_K,IQ4_XS,IQ2_XXS")
    parser.add_argument("--instructions", default=possible, help=f"of {possible}")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    names = options.instructions.split(",")
    x = np.random.default_rng(1).standard_normal((options.tokens, options.columns), dtype=np.float32)
    print("| format | " + " | ".join(names) + " | same bits |", flush=True)
    print("|---|" + "---|" * (len(names) + 1))
    with ThreadPool(1) as pool:
        for name in options.formats.split(","):
            weights = IntegerWeights(pool, 8)
            w = matrix(GGMLType[name], options.rows, options.columns)
            weights.repack(w)
            products = [Product(weights, w, x, instructions) for instructions in names]
            best = [float("inf")] * len(products)
            for _ in range(options.turns):
                best = [min(least, product.seconds()) for least, product in zip(best, products, strict=True)]
            speeds = [options.tokens * options.rows * options.columns / seconds / 1e9 for seconds in best]
            same = all(np.array_equal(product.out, products[0].out) for product in products)
            print(f"| {name} | " + " | ".join(f"{speed:.0f}" for speed in speeds) + f" | {same} |", flush=True)


if __name__ == "__main__":
    main()
