#!/usr/bin/env python
"""Times attention behind an indexer in decode steps beside attention to all positions, on the current GPU.

Graph replays of a chain of layers, each with its own caches, as scripts/bench_attention.py does. Medians of the
replays: microseconds for one layer.

    python -m scripts.bench_indexer
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.config import KvType
from engine.cuda.attention.attention import PAGE, Attention, AttentionShape, KernelRopeStyle
from engine.cuda.indexer.indexer import Choice, ChosenAttention, Rows, Scored, allocate
from engine.cuda.indexer.plan import IndexerShape, choice_arrays, range_arrays, ranges_of, scored_rows
from scripts.bench_attention import Chain, replay_us

_F16, _STYLE = KvType.F16, KernelRopeStyle.ADJACENT
SHAPES = {
    "DeepSeek 3.2, 2048 of them": (
        IndexerShape(64, 128, 2048, 1, 0, False, 2048, _F16),
        AttentionShape(128, 1, 576, 512, 0, _STYLE, _F16, values_in_keys=True),
    ),
    "64 x 128 kv4, 16 blocks of 128": (
        IndexerShape(4, 128, 16, 128, 1, True, 2048, _F16),
        AttentionShape(64, 4, 128, 128, 64, _STYLE, _F16),
    ),
}
PARTS = ("scores", "choice", "attention")


class Indexed(Chain):
    """Layers with an indexer each."""

    def __init__(self, indexer: IndexerShape, shape: AttentionShape, n: int, length: int) -> None:
        super().__init__(shape, n, length)
        cp, context = self.cp, (length // PAGE + 1) * PAGE
        if shape.values_in_keys:
            self.values = self.keys
        rng = cp.random.default_rng(1)

        def normal(*size: int) -> Any:
            return rng.standard_normal(size, dtype=np.float32)

        pages = self.keys[0].shape[0]
        self.index = [normal(pages, PAGE, indexer.width).astype(np.float16) for _ in range(self.layers)]
        weights = None if indexer.by_head else normal(n, indexer.heads)
        self.scored = Scored(normal(n, indexer.heads * indexer.width), weights)
        self.new = normal(n, indexer.width)
        multiprocessors = int(cp.cuda.Device().attributes["MultiProcessorCount"])
        self.choice = Choice(indexer, allocate(choice_arrays(indexer, n, n, context)), scored_rows(n))
        ranges = ranges_of(indexer, shape, context, multiprocessors)
        self.attend = ChosenAttention(self.choice, shape, ranges, allocate(range_arrays(shape, ranges)))
        self.positions = cp.asarray(np.full(n, length, np.int32))
        self.rows = Rows(self.positions, self.table, self.choice.identity[:n])

    def part_us(self, part: str) -> float:
        """Microseconds of what one part launches for a layer."""

        def launches(i: int) -> None:
            index, rows = self.index[i], self.rows
            if part == "scores":
                self.choice.append(self.new, index, rows)
                self.choice.score(self.scored, index, rows)
            elif part == "choice":
                self.choice.choose_scored(rows.count)
            else:
                self.attend(self.layer, self.qkv, self.keys[i], self.values[i], rows, self.out)

        launches(0)
        return self.chain_us(launches)

    def chain_us(self, launches: Callable[[int], None]) -> float:
        """Microseconds of launches(layer), one after the other."""
        n_launches = max(self.layers, 32)

        def record(stream: Any) -> int:
            with stream:
                for i in range(n_launches):
                    launches(i % self.layers)
            return n_launches

        self.cp.cuda.Device().synchronize()
        return replay_us(record)[0]


def table(depths: list[int]) -> None:
    """All shapes at some depths with some sequences side by side."""
    print(f"{'decode, us a layer':32}{'B':>4}{'depth':>8}{'all':>9}{'chosen':>9}" + "".join(f"{p:>11}" for p in PARTS))
    for name, (indexer, shape) in SHAPES.items():
        for n in (1, 8, 32):
            for depth in depths:
                chain, kernels = Indexed(indexer, shape, n, depth), Attention(shape, n)
                dense = chain.decode_us(kernels, [depth] * n)[0]
                parts = [chain.part_us(part) for part in PARTS]
                figures = "".join(f"{us:11.2f}" for us in parts)
                print(f"{name:32}{n:4}{depth:8}{dense:9.2f}{sum(parts):9.2f}{figures}", flush=True)
                del chain, kernels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--depths", type=lambda text: [int(one) for one in text.split(",")], default=[4096, 8192, 32768]
    )
    table(parser.parse_args().depths)
