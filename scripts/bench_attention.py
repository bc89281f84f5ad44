#!/usr/bin/env python
"""Times the attention kernels on the current GPU: graph replays of a chain of layers, each with its own cache.

The layers' caches together exceed the L2 cache, so reads come from memory as in a real step. Medians of the replays.

    python -m scripts.bench_attention                 # the standard table
    python -m scripts.bench_attention --tune          # block layouts of the decode kernel side by side
    python -m scripts.bench_attention --kv-types f16,q8_0 --shapes 8B --short    # caches side by side
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.config import KvType
from engine.cuda.attention.attention import (
    MAX_SPLITS,
    PAGE,
    Attention,
    AttentionShape,
    KernelRopeStyle,
    LayerAttention,
    decode_plan,
    prefill_tiles,
)

SHAPES = {
    "8B 32x128 kv8": AttentionShape(32, 8, 128, 128, 128, KernelRopeStyle.ADJACENT, KvType.F16),
    "1B 32x64 kv8": AttentionShape(32, 8, 64, 64, 64, KernelRopeStyle.ADJACENT, KvType.F16),
    "30B-A3B 32x128 kv4": AttentionShape(32, 4, 128, 128, 128, KernelRopeStyle.HALVES, KvType.F16),
}


def replay_us(record: Callable[[Any], int], repeats: int = 15) -> tuple[float, float]:
    """Captures what `record(stream)` launches and replays it: median and spread of microseconds per launch."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    record(stream)
    stream.synchronize()
    with stream:
        stream.begin_capture()
        n = record(stream)
        graph = stream.end_capture()
    times = []
    for _ in range(repeats + 3):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 1000 / n)
    times = times[3:]
    return statistics.median(times), max(times) - min(times)


class Chain:
    """Layers of one shape with random caches for n sequences of up to `length` positions."""

    def __init__(self, shape: AttentionShape, n: int, length: int, rows: int = 1) -> None:
        import cupy

        self.shape, self.n, self.cp = shape, n, cupy
        slots = (length + rows) // PAGE + 1
        pages = n * slots
        one = pages * shape.kv_heads * PAGE * shape.cached_bytes
        self.layers = max(4, min(64, (400 << 20) // one))
        rng = cupy.random.default_rng(0)

        def cache(dim: int) -> list[Any]:
            size, dtype = shape.cache_array(pages, dim)
            if not shape.bytes_cached:
                return [rng.standard_normal(size, dtype=np.float32).astype(dtype) for _ in range(self.layers)]
            made = [rng.integers(1, 256, size, dtype=dtype) for _ in range(self.layers)]
            for one in made:  # scales as those of normal numbers
                one[..., PAGE * dim :].view(np.float16)[...] = np.float16(2.5 / 127)
            return made

        self.keys, self.values = cache(shape.key_dim), cache(shape.value_dim)
        self.table = cupy.asarray(np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(n, slots))
        self.qkv = rng.standard_normal((n * rows, shape.row_width), dtype=np.float32)
        self.out = cupy.empty((n * rows, shape.heads * shape.value_dim), np.float32)
        rope = shape.rope_dim // 2
        inv_freq = cupy.asarray(500000.0 ** (-np.arange(rope) / rope))
        self.layer = LayerAttention(shape.key_dim**-0.5, inv_freq)

    def decode_us(self, kernels: Attention, lengths: Sequence[int]) -> tuple[float, float]:
        """Median and spread of microseconds for one decode launch with sequences of these lengths."""
        positions = self.cp.asarray(np.array(lengths, np.int32))
        n_launches = max(self.layers, 32)

        def record(stream: Any) -> int:
            for i in range(n_launches):
                k, v = self.keys[i % self.layers], self.values[i % self.layers]
                kernels.decode(self.layer, self.qkv, k, v, self.table, positions, self.out, stream=stream)
            return n_launches

        self.cp.cuda.Device().synchronize()
        return replay_us(record)

    def gb_s(self, n_positions: int, us: float) -> float:
        """Cache bytes read per second, in GB/s."""
        shape = self.shape
        n_bytes = n_positions * shape.kv_heads * shape.cached_bytes
        return n_bytes / us / 1e3


def decode_table(shapes: dict[str, AttentionShape], bandwidth: float) -> None:
    """Decode: sequences of one length, then one long sequence among short ones; percent of the read bandwidth."""
    print(f"{'decode':28}{'B':>4}{'length':>8}{'us':>9}{'spread':>8}{'GB/s':>8}{'%':>5}")
    alone = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768, 131072)
    many = (128, 256, 1024, 4096, 8192)
    for name, shape in shapes.items():
        for n, lengths in ((1, alone), (4, many), (16, many), (64, many), (256, many[:3])):
            chain, kernels = Chain(shape, n, max(lengths)), Attention(shape, n)
            rows: list[tuple[object, list[int]]] = [(length, [length] * n) for length in lengths]
            if n == 64:
                rows.append(("1 long", [8192] + [256] * 63))
                rows.append(("mixed", [64 + 61 * i for i in range(64)]))
            for title, each in rows:
                us, spread = chain.decode_us(kernels, each)
                rate = chain.gb_s(sum(each), us)
                print(f"{name:28}{n:4}{title:>8}{us:9.2f}{spread:8.2f}{rate:8.0f}{rate / bandwidth:5.0%}", flush=True)


def prefill_us(shape: AttentionShape, rows: int, past: int) -> tuple[float, float]:
    """Microseconds of rope_append and of attention for `rows` new rows behind `past` cached ones."""
    chain, kernels = Chain(shape, 1, past + rows, rows), Attention(shape, 1)
    cp = chain.cp
    positions = cp.arange(past, past + rows, dtype=np.int32)
    sequence = cp.zeros(rows, np.int32)
    tiles = cp.asarray(prefill_tiles([(0, rows, 0, past)], kernels.tile_rows))
    cp.cuda.Device().synchronize()

    def rope(stream: Any) -> int:
        caches = (chain.keys[0], chain.values[0], chain.table)
        for _ in range(8):  # turning the queries again and again costs the same
            kernels.rope_append(chain.layer, chain.qkv, *caches, sequence, positions, stream=stream)
        return 8

    def attend(stream: Any) -> int:
        for k, v in zip(chain.keys[:4], chain.values[:4], strict=True):
            kernels.prefill(chain.layer, chain.qkv, k, v, chain.table, tiles, chain.out, stream=stream)
        return 4

    return replay_us(rope)[0], replay_us(attend)[0]


def short_table(shapes: dict[str, AttentionShape], bandwidth: float, peak: float) -> None:
    """What decides between caches: one sequence, many of a middling length, and pieces of prompts."""
    for name, shape in shapes.items():
        for n, length in ((1, 1024), (1, 8192), (1, 32768), (4, 8192), (64, 128), (64, 1024), (256, 1500), (512, 1500)):
            chain = Chain(shape, n, length)
            of_many = replace(shape, stretch=2 if n > 64 and shape.bytes_cached else 1)
            us, spread = chain.decode_us(Attention(of_many, n), [length] * n)
            rate = chain.gb_s(n * length, us)
            print(f"{name:28}{n:4}{length:8}{us:9.2f}{spread:8.2f}{rate:8.0f}{rate / bandwidth:5.0%}", flush=True)
            del chain
        for rows, past in ((512, 0), (512, 8192), (2048, 0)):
            rope_us, us = prefill_us(shape, rows, past)
            rate = (
                2 * (rows * past + rows * (rows + 1) // 2) * shape.heads * (shape.key_dim + shape.value_dim) / us / 1e6
            )
            print(f"{name:28}{rows:5}{past:8}{rope_us:9.1f}{us:9.1f}{rate:9.0f}{rate / peak:5.0%}", flush=True)


def prefill_table(shapes: dict[str, AttentionShape], peak: float) -> None:
    """rope_append and prefill of some rows at several depths; percent of the matrix peak."""
    print(f"{'prefill':28}{'rows':>5}{'past':>8}{'rope us':>9}{'attn us':>9}{'TFLOP/s':>9}{'%':>5}")
    for name, shape in shapes.items():
        for rows, past in ((512, 0), (512, 8192), (512, 32256), (2048, 0), (2048, 8192), (64, 8192)):
            rope_us, us = prefill_us(shape, rows, past)
            pairs = rows * past + rows * (rows + 1) // 2
            rate = 2 * pairs * shape.heads * (shape.key_dim + shape.value_dim) / us / 1e6
            print(f"{name:28}{rows:5}{past:8}{rope_us:9.1f}{us:9.1f}{rate:9.0f}{rate / peak:5.0%}", flush=True)


def tune_table(shapes: dict[str, AttentionShape]) -> None:
    """Decode layouts: warps, splits, smallest chunk."""
    import cupy

    from engine.cuda.driver.compiler import device_arch

    multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    lengths = (64, 128, 256, 512, 1024, 4096, 8192)
    for name, shape in shapes.items():
        chain = Chain(shape, 1, max(lengths))
        crowd = Chain(shape, 64, 1024)
        print(f"{name}: us at " + ", ".join(map(str, lengths)) + "; 64 sequences at 1024")
        for warps in (8, 4, 16):
            base = decode_plan(shape, device_arch(), multiprocessors, warps=warps)
            for factor in (1, 2):
                for min_chunk in (128, 256):
                    n_splits = min(MAX_SPLITS, base.few_splits * factor)
                    plan = replace(base, n_splits=n_splits, min_chunk=min_chunk)
                    kernels, many = Attention(shape, 1, plan=plan), Attention(shape, 64, plan=plan)
                    row = [chain.decode_us(kernels, [length])[0] for length in lengths]
                    row.append(crowd.decode_us(many, [1024] * 64)[0])
                    title = f"  warps {warps:2} splits {n_splits:3} chunk {min_chunk}: "
                    print(title + " ".join(f"{us:7.2f}" for us in row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tune", action="store_true", help="compare block layouts of the decode kernel")
    parser.add_argument("--bandwidth", type=float, default=4400, help="GB/s of the card (default: an H200's, measured)")
    parser.add_argument("--tflops", type=float, default=790, help="float16 matrix peak (default: an H200's by cuBLAS)")
    parser.add_argument("--kv-types", default="f16", help="caches, with commas between them (default: f16)")
    parser.add_argument("--shapes", default="", help="only shapes whose name begins so")
    parser.add_argument("--short", action="store_true", help="a few points alone")
    options = parser.parse_args()
    chosen = {
        f"{name} {kind}": replace(shape, kv_type=KvType.parse(kind))
        for name, shape in SHAPES.items()
        for kind in options.kv_types.split(",")
        if name.startswith(options.shapes)
    }
    if options.tune:
        tune_table(chosen)
    elif options.short:
        short_table(chosen, options.bandwidth, options.tflops)
    else:
        decode_table(chosen, options.bandwidth)
        prefill_table(chosen, options.tflops)
