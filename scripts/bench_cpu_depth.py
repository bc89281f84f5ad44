"""What a long context costs a decode step on the CPU.

    python -m scripts.bench_cpu_depth model.gguf --depths 128,4096 --turns 20

The cache is filled with random keys and values instead of a long prompt, which would take minutes; then single steps
at each depth run by turns, so that slower moments of the machine affect all depths alike. A turn takes the fastest of
three steps at each depth. Prints the medians and minima, and how much speed is lost against the first depth, turn by
turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import numpy as np

from engine.cpu.backend import CpuBackend
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model

STEPS = 3
"""Steps per turn and depth."""


def fill(backend: CpuBackend) -> None:
    """Random numbers in every page; zeros would be one page of memory, read from the cache all the time."""
    rng = np.random.default_rng(0)
    (span,) = Batch.build([(0, np.zeros(backend.context_length, np.int32), 0, Outputs.NONE)]).spans
    backend.cache.reserve([span])
    for layer in range(len(backend.config.layers)):
        k, v = (
            rng.standard_normal((span.n_rows, array.shape[1], array.shape[3]), dtype=np.float32)
            for array in backend.cache.arrays(layer)
        )
        backend.cache.append(layer, span, k, v)


def step_seconds(backend: CpuBackend, position: int) -> float:
    """One token fed at a position, to its logits."""
    batch = Batch.build([(0, np.array([5], np.int32), position, Outputs.LAST)])
    started = time.perf_counter()
    backend.forward(batch)
    return time.perf_counter() - started


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--depths", default="128,4096", help="tokens in the cache")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-type", default="f16", choices=("f16", "f32", "q8_0"))
    arguments = parser.parse_args()
    depths = [int(depth) for depth in arguments.depths.split(",")]
    options: dict[str, Any] = {"threads": arguments.threads, "kv_type": arguments.kv_type, "activation_bits": 8}
    with open_gguf(arguments.model) as gguf:
        backend = CpuBackend(load_model(gguf), context_length=max(depths) + 1, **options)
        backend.warm_up(lambda text: print(text, file=sys.stderr))
        fill(backend)
        turns = []
        for turn in range(arguments.turns + 1):
            times = [min(step_seconds(backend, depth) for _ in range(STEPS)) for depth in depths]
            if turn:  # the first one warms up
                turns.append(times)
        backend.close()
    for place, depth in enumerate(depths):
        times = [turn[place] for turn in turns]
        losses = [1 - turn[0] / turn[place] for turn in turns]
        least = 1 - min(turn[0] for turn in turns) / min(times)
        print(
            f"depth {depth}: median {median(times) * 1e3:.2f} ms, least {min(times) * 1e3:.2f} ms a token; "
            f"loss of speed {median(losses):.1%} in the median turn, {least:.1%} between the least times"
        )


if __name__ == "__main__":
    main()
