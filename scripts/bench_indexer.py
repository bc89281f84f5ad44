#!/usr/bin/env python
"""Times attention behind an indexer beside attention to all positions, in decode steps and prompts, on the current GPU.

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
from engine.cuda.attention.attention import PAGE, Attention, AttentionShape, KernelRopeStyle, prefill_tiles
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.indexer.indexer import Choice, ChosenAttention, Rows, Scored, allocate
from engine.cuda.indexer.plan import IndexerShape, choice_arrays, head_tile, range_arrays, ranges_of, scored_rows
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
PLAIN = "in float32"
"""Attention without tensor cores, which does not count."""


class Indexed(Chain):
    """Layers with an indexer each: n sequences with one row, or one with several rows, behind `length` positions."""

    def __init__(self, indexer: IndexerShape, shape: AttentionShape, n: int, length: int, rows: int = 1) -> None:
        super().__init__(shape, n, length, rows)
        cp, context, n = self.cp, ((length + rows) // PAGE + 1) * PAGE, n * rows
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
        self.attend = {}
        for name in (PARTS[-1], PLAIN):
            tile = head_tile(shape, plain=name == PLAIN)
            ranges = ranges_of(indexer, shape, tile, context, multiprocessors)
            memory = allocate(range_arrays(shape, ranges))
            self.attend[name] = ChosenAttention(self.choice, shape, tile, ranges, memory)
        self.positions = cp.asarray(length + np.arange(n, dtype=np.int32) % rows)
        sequence = self.choice.identity[:n] if rows == 1 else cp.zeros(n, np.int32)
        self.rows = Rows(self.positions, self.table, sequence)

    def part_us(self, part: str, n_launches: int = 32) -> float:
        """Microseconds of what one part launches for a layer."""

        def launches(i: int) -> None:
            index, rows = self.index[i], self.rows
            if part == "scores":
                self.choice.append(self.new, index, rows)
                self.choice.score(self.scored, index, rows)
            elif part == "choice":
                self.choice.choose_scored(rows.count)
            else:
                self.attend[part](self.layer, self.qkv, self.keys[i], self.values[i], rows, self.out)

        launches(0)
        return self.chain_us(launches, n_launches)

    def chain_us(self, launches: Callable[[int], None], n_launches: int) -> float:
        """Microseconds of launches(layer), so many layers one after the other."""

        def record(stream: Any) -> int:
            with stream:
                for i in range(n_launches):
                    launches(i % self.layers)
            return n_launches

        self.cp.cuda.Device().synchronize()
        return replay_us(record)[0]


def table(sizes: list[tuple[int, int]]) -> None:
    """All shapes with some (sequences side by side, depth)."""
    head(f"{'decode, us a layer':32}{'B':>4}{'depth':>8}")
    for name, (indexer, shape) in SHAPES.items():
        for n, depth in sizes:
            chain, kernels = Indexed(indexer, shape, n, depth), Attention(shape, n)
            dense = chain.decode_us(kernels, [depth] * n)[0]
            parts = [chain.part_us(part) for part in (*PARTS, PLAIN)]
            show(name, n, depth, dense, parts)
            del chain, kernels


def head(first: str) -> None:
    """Names of the columns."""
    print(f"{first}{'all':>9}{'chosen':>9}" + "".join(f"{part:>11}" for part in (*PARTS, PLAIN)))


def show(name: str, n: int, depth: int, dense: float, parts: list[float]) -> None:
    """A line of the table."""
    figures = "".join(f"{us:11.2f}" for us in parts)
    print(f"{name:32}{n:4}{depth:8}{dense:9.2f}{sum(parts[:-1]):9.2f}{figures}", flush=True)


def prompts(rows: int, past: int) -> None:
    """The same of a piece of a prompt."""
    head(f"{'a prompt, us a layer':32}{'T':>4}{'behind':>8}")
    for name, (indexer, shape) in SHAPES.items():
        chain, kernels = Indexed(indexer, shape, 1, past, rows), Attention(shape, 1)
        tiles = chain.cp.asarray(prefill_tiles([(0, rows, 0, past)], kernels.tile_rows))

        def attend(i: int, chain: Indexed = chain, kernels: Attention = kernels, tiles: DeviceArray = tiles) -> None:
            kernels.prefill(chain.layer, chain.qkv, chain.keys[i], chain.values[i], chain.table, tiles, chain.out)

        show(name, rows, past, chain.chain_us(attend, 4), [chain.part_us(part, 4) for part in (*PARTS, PLAIN)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depths", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    table([(n, depth) for n in options.sequences for depth in options.depths])
    prompts(512, 8192)
