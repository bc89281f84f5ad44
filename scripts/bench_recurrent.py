"""Time the kernels of recurrent layers on a GPU, and the bricks of a prompt, with CUDA events.

    python -m scripts.bench_recurrent                        kernels at real shapes, random data
    python -m scripts.bench_recurrent --only RWKV            those whose names contain it
    python -m scripts.bench_recurrent MODEL.gguf --rows 2048 every brick of a batch of prompt tokens

Kernels: the median of calls, launches included, behind one that is not counted; prompts of 2048 tokens of one sequence
or eight, decode steps of 1, 16 and 64 rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine.cuda.load.device_weights import DeviceLayer
from engine.cuda.recurrent.delta import Delta, DeltaConstants, DeltaInputs, DeltaShape
from engine.cuda.recurrent.mamba_2 import Mamba2, Mamba2Constants, Mamba2Shape
from engine.cuda.recurrent.plan import StateShape
from engine.cuda.recurrent.rows import DecodeRows, PromptRows, Rows, span_table
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6, Rwkv6Constants, Rwkv6Inputs, Rwkv6Shape
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7, Rwkv7Constants, Rwkv7Inputs, Rwkv7Shape

PLACES = 2
TOKENS = 2048


def microseconds(call: Callable[[], object], repeats: int = 9) -> float:
    """Median time of a call."""
    import cupy

    call()
    times = []
    for _ in range(repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * cupy.cuda.get_elapsed_time(begin, end))
    return float(median(times))


def noise(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Any:
    """A float32 array on the device."""
    import cupy

    return cupy.asarray(np.random.default_rng(0).normal(mean, scale, shape).astype(np.float32))


def room(shape: StateShape, n: int, *, chunks: bool) -> Any:
    """What kernels of chunks leave for each other; None for token after token."""
    import cupy

    return cupy.empty((n, shape.chunk_width), np.float32) if chunks else None


def delta_call(shape: DeltaShape, rows: Rows, n: int, slots: int, *, chunks: bool) -> Callable[[], object]:
    """A delta rule over n rows."""
    import cupy

    mixed, n_steps = noise(n, shape.row), shape.inner if shape.key_decays else shape.heads
    at, end = shape.convolved, shape.convolved + shape.inner
    inputs = DeltaInputs(mixed, mixed[:, at:end], mixed[:, end : end + shape.heads], noise(n, n_steps))
    small = noise(shape.convolved, shape.d_conv), noise(n_steps, mean=-4), noise(shape.heads, scale=0.1, mean=-1)
    constants = DeltaConstants(*small, noise(shape.head), 1e-6)
    states = [cupy.zeros((slots * PLACES, *one), np.float32) for one in shape.state_shapes]
    convolved, out = (cupy.zeros((n, width), np.float32) for width in (shape.convolved, shape.inner))
    kernels, between = Delta(shape), room(shape, n, chunks=chunks)
    return lambda: kernels(rows, inputs, constants, states[0], states[1], convolved, out, chunked=between)


def mamba_2_call(shape: Mamba2Shape, rows: Rows, n: int, slots: int, *, chunks: bool) -> Callable[[], object]:
    """The state space of Mamba 2 over n rows."""
    import cupy

    mixed, heads = noise(n, shape.row_width), shape.heads
    small = noise(shape.convolved, shape.d_conv), noise(shape.convolved), noise(heads, mean=-4), noise(heads, mean=-9)
    constants = Mamba2Constants(*small, noise(heads))
    states = [cupy.zeros((slots * PLACES, *one), np.float32) for one in shape.state_shapes]
    convolved, out = (cupy.zeros((n, width), np.float32) for width in (shape.convolved, shape.inner))
    kernels, between = Mamba2(shape), room(shape, n, chunks=chunks)
    return lambda: kernels(rows, mixed, constants, states[0], states[1], convolved, out, chunked=between)


def rwkv_6_call(shape: Rwkv6Shape, rows: Rows, n: int, slots: int, *, chunks: bool) -> Callable[[], object]:
    """Time mixing of version 6 over n rows, behind its products."""
    import cupy

    d, keys = shape.inner, shape.kv_heads * shape.head
    row, at = noise(n, 3 * d + 2 * keys), np.cumsum([0, d, d, keys, keys, d]).tolist()
    inputs = Rwkv6Inputs(*(row[:, first:end] for first, end in pairwise(at)))
    constants = Rwkv6Constants(noise(d), noise(d), noise(d), 1e-5)
    memory = cupy.zeros((slots * PLACES, *shape.state_shapes[1]), np.float32)
    kernels, out = Rwkv6(shape), cupy.zeros((n, d), np.float32)
    between = room(shape, n, chunks=chunks)
    return lambda: kernels(rows, inputs, constants, memory, out, chunked=between)


def rwkv_7_call(shape: Rwkv7Shape, rows: Rows, n: int, slots: int, *, chunks: bool) -> Callable[[], object]:
    """Time mixing of version 7 over n rows, behind its products."""
    import cupy

    d = shape.inner
    row = noise(n, 8 * d)
    inputs = Rwkv7Inputs(*(row[:, i * d : (i + 1) * d] for i in range(8)))
    k_k, k_a, r_k, norm, bias = (noise(d) for _ in range(5))
    constants = Rwkv7Constants(k_k, k_a, r_k, norm, bias, 1e-5)
    memory = cupy.zeros((slots * PLACES, *shape.state_shapes[1]), np.float32)
    kernels, out, first = Rwkv7(shape), cupy.zeros((n, d), np.float32), noise(n, d)
    between = room(shape, n, chunks=chunks)
    return lambda: kernels(rows, inputs, constants, first, memory, out, chunked=between)


CALLS: dict[str, tuple[Any, Callable[..., Callable[[], object]]]] = {
    "delta, 32 heads of 128": (DeltaShape(32, 16, 128, 4, 12352, False, False, False), delta_call),
    "Kimi delta, 32 heads of 128": (DeltaShape(32, 32, 128, 4, 16640, True, True, True), delta_call),
    "Mamba 2, 128 heads of 64, 128 states": (Mamba2Shape(128, 64, 8, 128, 4), mamba_2_call),
    "RWKV-6, 64 heads of 64": (Rwkv6Shape(64, 64, True, 64, False), rwkv_6_call),
    "RWKV-7, 64 heads of 64": (Rwkv7Shape(64, 64, True), rwkv_7_call),
}


def kernels(only: str) -> None:
    """Prints the times of prompts and decode steps, of names that contain `only`."""
    import cupy

    for name, (shape, call) in CALLS.items():
        if only not in name:
            continue
        for spans in (1, 8):
            each = TOKENS // spans
            table = span_table([(i * each, each, 0, i * PLACES, i * PLACES + 1) for i in range(spans)])
            rows = PromptRows.of(table, cupy.asarray)
            for chunks in (False, True) if shape.chunk_width else (False,):
                time = microseconds(call(shape, rows, TOKENS, spans, chunks=chunks))
                how = "in chunks" if chunks else "token after token"
                print(f"{name}: prompts of {spans} x {each} tokens {how} {time:.0f} us", flush=True)
        for n in (1, 16, 64):
            tables = cupy.full(n, 5, np.int32), cupy.zeros(n, np.int32)
            time = microseconds(call(shape, DecodeRows(*tables, PLACES), n, n, chunks=False), 30)
            print(f"{name}: {n} decode rows {time:.1f} us, with the launch", flush=True)


def layer_events(layers: Sequence[DeviceLayer], ops: Any) -> dict[str, list[tuple[Any, Any]]]:
    """Launches all layers; events around every brick, by its name."""
    import cupy

    found: dict[str, list[tuple[Any, Any]]] = {}

    def timed(brick: str, *args: Any) -> Any:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        result = getattr(ops, brick)(*args)
        end.record()
        found.setdefault(brick, []).append((begin, end))
        return result

    x = ops.embed(None)
    for layer in layers:
        if layer.recurrent_part is not None:
            x = timed("ssm_out", layer, timed("ssm", layer, timed("ssm_in", layer, x)), x)
        else:
            x = timed("attn_output", layer, timed("attention", layer, timed("attn_qkv", layer, x)), x)
        x = timed("feed_forward", layer, x, x)
    return found


def bricks(path: Path, n_rows: int) -> None:
    """Prints the time of every brick of a batch of prompt tokens."""
    import cupy

    from engine.config import page_count
    from engine.cuda.runner import CudaRunner
    from engine.gguf import open_gguf
    from engine.model.batch import Batch, Outputs
    from engine.model.loader import load_model

    with open_gguf(path) as gguf:
        model = load_model(gguf)
        runner = CudaRunner(
            model, context_length=2 * n_rows, kv_type="f16", max_sequences=1, prefill_chunk=n_rows, eager=True
        )
        machine = runner._machine
        ops: Any = machine.prompt_ops
        with runner._running():
            machine.cache.set_pages(0, list(range(page_count(2 * n_rows))))
            ids = np.random.default_rng(0).integers(0, 1000, n_rows).astype(np.int32)
            for first in (0, n_rows):
                ops.begin(Batch.build([(0, ids, first, Outputs.NONE)]))
                events = layer_events(machine.weights.layers, ops)
                runner._gpu.stream.synchronize()
                print(f"{n_rows} rows behind {first}: brick, layers, us a layer")
                for brick, pairs in events.items():
                    times = [1e3 * cupy.cuda.get_elapsed_time(*pair) for pair in pairs]
                    print(f"  {brick:14} {len(times):3} {median(times):9.1f}", flush=True)
        runner.close()
        del model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time recurrent layers on a GPU.")
    parser.add_argument("model", nargs="?", type=Path, help="a file whose bricks are timed; else kernels alone")
    parser.add_argument("--rows", type=int, default=TOKENS)
    parser.add_argument("--only", default="", help="a part of the names of kernels")
    args = parser.parse_args()
    if args.model is None:
        kernels(args.only)
    else:
        bricks(args.model, args.rows)


if __name__ == "__main__":
    main()
