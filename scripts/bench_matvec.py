"""Kernel lab of the matrix-vector kernels: correctness against float64, then speed in captured chains.

Usage:
    python -m scripts.bench_matvec check     every format and batch size against float64 (normalized mean squared error)
    python -m scripts.bench_matvec shapes    single shapes, chained in a graph with early start
    python -m scripts.bench_matvec tune      block shapes on the main matrices
    python -m scripts.bench_matvec step      all projections of a whole decode step, 1B and 8B
    python -m scripts.bench_matvec many      shapes and whole steps for 1 to 256 sequences, both families of kernels
    python -m scripts.bench_matvec handover  gate and up, then down, of 32 and 64 sequences: who makes down's operand
    python -m scripts.bench_matvec dequant   packed to row-major half and float
Several may be named. Percentages are of the read bandwidth measured at the start. Weights are random bytes and each
launch reads another copy, so that nothing comes from the L2 cache; a time is the median of graph replays divided by the
launches in the graph.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, replace
from functools import cache, partial
from typing import Any

import cupy
import numpy as np

from engine.cuda.driver.compiler import device_arch, prebuild
from engine.cuda.formats.dequant import build_jobs as dequant_jobs
from engine.cuda.formats.dequant import dequantize, embed
from engine.cuda.formats.layouts import LAYOUTS, packed_bytes, tile_count
from engine.cuda.formats.repack import PackedMatrix, repack
from engine.cuda.formats.repack import build_job as pack_job
from engine.cuda.launch_plan.families import Card, Family, Phase
from engine.cuda.launch_plan.products import Chooser, Matrix
from engine.cuda.launch_plan.steps import Step
from engine.cuda.matrix.decode_gemm import DecodeGemm
from engine.cuda.matrix.decode_gemm_plan import operand_bytes, word_count
from engine.cuda.matrix.matvec import MatVec, multiprocessor_count
from engine.cuda.matrix.matvec_plan import Tuning, kernel_job
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import FORMATS, row_bytes
from engine.gguf.quants import dequantize as decode
from engine.gguf.types import GGMLType as T

READ = r"""
extern "C" __global__ void read_all(const uint4* p, long long n, unsigned* out) {
    unsigned acc = 0;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    for (; i + 3 * step < n; i += 4 * step) {
        const uint4 a = __ldcs(p + i), b = __ldcs(p + i + step);
        const uint4 c = __ldcs(p + i + 2 * step);
        const uint4 d = __ldcs(p + i + 3 * step);
        acc ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    if (acc == 0x12345678u) out[0] = acc;
}
"""


def milliseconds(graph: Any, stream: Any, repeats: int = 15) -> float:
    """Median time of a replay."""
    times: list[float] = []
    for i in range(repeats + 3):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        if i >= 3:
            times.append(cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


def capture(work: Callable[[], object]) -> tuple[Any, Any]:
    """Runs the work once, then captures it."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        work()
        stream.synchronize()
        stream.begin_capture()
        work()
        graph = stream.end_capture()
        graph.upload(stream)
    return graph, stream


def run_all(calls: Iterable[Callable[[], None]]) -> None:
    """Launch one after the other."""
    for call in calls:
        call()


def read_bandwidth() -> float:
    """GB/s of a plain read of 4 GiB."""
    data = cupy.zeros(1 << 32, cupy.uint8)
    out = cupy.zeros(1, cupy.uint32)
    kernel = cupy.RawKernel(READ, "read_all")
    graph, stream = capture(lambda: kernel((132 * 8,), (512,), (data, np.int64(data.size // 16), out)))
    return float(data.size / milliseconds(graph, stream) / 1e6)


def random_rows(rng: np.random.Generator, type: T, rows: int, columns: int) -> np.ndarray:
    """Packed rows with random quants and sane scales."""
    if type in (T.F32, T.F16, T.BF16):
        values = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
        if type == T.F32:
            return values.view(np.uint8)
        if type == T.F16:
            return values.astype(np.float16).view(np.uint8)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    raw = rng.integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8)
    blocks = raw.reshape(-1).view(FORMATS[type].layout)
    for name in blocks.dtype.names or ():
        if blocks.dtype[name].base == np.float16:
            blocks[name] = (rng.standard_normal(blocks[name].shape) * 0.01).astype(np.float16)
    return raw


def nmse(found: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None, x: np.ndarray | None = None) -> float:
    """Squared error over squared truth; given the factors, over what the square of their product is expected to be.

    The second does not grow where random terms happen to cancel.
    """
    size = np.sum(truth**2) if weights is None or x is None else np.sum((x**2) @ (weights**2).T)
    return float(np.sum((found.astype(np.float64) - truth) ** 2) / size)


def sigmoid(v: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-v)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * v))


def check() -> bool:
    """All formats, batches and odd row counts; prints the worst error of each format."""
    rng = np.random.default_rng(1)
    good = True
    arch = device_arch()
    card, shapes = (arch, multiprocessor_count(cupy.cuda.Device().id)), ((33, 512), (257, 4352), (48, 14336))
    jobs = [
        kernel_job([type], tile_count(rows), columns, batch, card)[0]
        for type in LAYOUTS
        for batch in (1, 2, 4, 8)
        for rows, columns in shapes
    ]
    jobs = list({repr(job): job for job in jobs}.values())
    prebuild(jobs + [job for type in LAYOUTS for job in (pack_job(type), *dequant_jobs(type))], arch)
    for type in LAYOUTS:
        worst, batch_equal, exact = 0.0, True, True
        for rows, columns in shapes:
            raw = random_rows(rng, type, rows, columns)
            weights = decode(raw, type)
            matrix = repack(cupy.asarray(raw.reshape(-1)), type, rows, columns)
            plain = cupy.empty((rows, columns), cupy.float32)
            dequantize(matrix, plain)
            taken = cupy.empty((2, columns), cupy.float32)
            embed(matrix, cupy.array([rows - 1, 0], cupy.int32), taken)
            if type == T.F32:
                exact &= float(np.abs(plain.get() - weights).max()) < 1e-6 * float(np.abs(weights).max())
            else:
                exact &= np.array_equal(plain.get(), weights) and np.array_equal(taken.get(), weights[[rows - 1, 0]])
            norm = rng.uniform(0.5, 1.5, columns).astype(np.float32)
            x = (rng.standard_normal((8, columns)) * np.exp(rng.standard_normal((8, columns)))).astype(np.float32)
            scaled = (
                x.astype(np.float64) / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5) * norm
            )
            weights = weights.astype(np.float64)
            truth, plain_truth = scaled @ weights.T, x.astype(np.float64) @ weights.T
            product = MatVec([matrix])
            single = None
            for batch in (8, 1, 2, 3, 4, 7):
                out = cupy.full((batch, rows), 3.0, cupy.float32)
                product(cupy.asarray(x[:batch]), out, norm=cupy.asarray(norm), eps=1e-5)
                worst = max(worst, nmse(out.get(), truth[:batch], weights, scaled[:batch]))
                single = out.get() if single is None else single
                batch_equal &= np.array_equal(out.get(), single[:batch])
                again = cupy.full((batch, rows), 3.0, cupy.float32)
                product(cupy.asarray(x[:batch]), again, add=True)
                worst = max(worst, nmse(again.get() - 3.0, plain_truth[:batch], weights, x[:batch].astype(np.float64)))
        # gate and up in one
        raw, other = random_rows(rng, type, 40, 512), random_rows(rng, type, 40, 512)
        pair = repack(cupy.asarray(raw.reshape(-1)), type, 40, 512, partner=cupy.asarray(other.reshape(-1)))
        x = rng.standard_normal((3, 512)).astype(np.float32)
        out = cupy.empty((3, 40), cupy.float32)
        MatVec([pair])(cupy.asarray(x), out, activation=KernelActivation.SILU)
        gate, up = (x.astype(np.float64) @ decode(r, type).astype(np.float64).T for r in (raw, other))
        pair_error = nmse(out.get(), gate * sigmoid(gate) * up)
        both = cupy.empty((2, 40, 512), cupy.float32)
        dequantize(pair, both)
        if type != T.F32:
            exact &= np.array_equal(both.get(), np.stack([decode(raw, type), decode(other, type)]))
        print(
            f"{type.name:5} worst NMSE {worst:.1e}, gate and up {pair_error:.1e}  "
            f"same bits in any batch {batch_equal}  unpacked exactly {exact}",
            flush=True,
        )
        good &= worst < 1e-8 and pair_error < 1e-6 and batch_equal and exact
    matrices, truths = [], []
    for type, rows in ((T.Q4_K, 48), (T.Q8_0, 17), (T.Q6_K, 30)):
        raw = random_rows(rng, type, rows, 1024)
        truths.append(decode(raw, type).astype(np.float64))
        matrices.append(repack(cupy.asarray(raw.reshape(-1)), type, rows, 1024))
    x = rng.standard_normal((2, 1024)).astype(np.float32)
    bias = rng.standard_normal(95).astype(np.float32)
    out = cupy.empty((2, 95), cupy.float32)
    MatVec(matrices)(cupy.asarray(x), out, bias=cupy.asarray(bias))
    error = nmse(out.get(), x.astype(np.float64) @ np.concatenate(truths).T + bias)
    print(f"group of Q4_K, Q8_0, Q6_K with bias: NMSE {error:.1e}")
    return good and error < 1e-9


def random_matrix(type: T, rows: int, columns: int, paired: bool = False) -> PackedMatrix:
    """Random bytes as a packed matrix."""
    n_bytes = packed_bytes(type, rows, columns, paired=paired)
    data = cupy.random.randint(0, 1 << 32, -(-n_bytes // 4), dtype=cupy.uint32).view(cupy.uint8)[:n_bytes]
    scale = cupy.ones(2, cupy.float32) if LAYOUTS[type].scaled else None
    return PackedMatrix(type, rows, columns, data, scale, paired)


Group = tuple[Sequence[tuple[T, int]], int, str]  # types and rows, columns, kind: norm, add, pair


@cache
def stream_of(batch: int, width: int, which: int = 0) -> Any:
    """Activations, which are the same arrays in every layer; x and out differ."""
    return cupy.ones((batch, width), cupy.float32) * (which + 1)


def launcher(group: Group, batch: int, tuning: Tuning | None, operand: Any = None) -> tuple[MatVec, Callable[[], None]]:
    """A product of fresh random matrices and its launch, like a brick of the decode step; operand: by DecodeGemm."""
    parts, columns, kind = group
    matrices = [random_matrix(type, rows, columns, kind == "pair") for type, rows in parts]
    product = MatVec(matrices, tuning=tuning)
    activation = KernelActivation.SILU if kind == "pair" else KernelActivation.NONE
    x, out = stream_of(batch, columns), stream_of(batch, product.width, 0 if kind == "add" else 1)
    more = {"add": True} if kind == "add" else {"norm": cupy.ones(columns, cupy.float32), "eps": 1e-5}
    if operand is None:
        product.prepare(batch, activation)
        return product, lambda: product(x, out, activation=activation, **more)
    many = DecodeGemm(matrices, multiprocessor_count(cupy.cuda.Device().id))
    many.prepare(batch, activation)
    return product, lambda: many(x, out, operand, activation=activation, **more)


def time_group(group: Group, batch: int = 1, tuning: Tuning | None = None, operand: Any = None) -> tuple[float, float]:
    """Microseconds of a launch in a chain, and its GB/s."""
    product, call = launcher(group, batch, tuning, operand)
    copies = max(4, min(64, -(-300_000_000 // product.n_bytes)))
    calls = [call] + [launcher(group, batch, tuning, operand)[1] for _ in range(copies - 1)]
    graph, stream = capture(lambda: run_all(calls))
    time = milliseconds(graph, stream) / copies * 1e3
    return time, product.n_bytes / time / 1e3


MAIN: list[tuple[str, Group]] = [
    ("fixed cost 2112x256 Q4_K", ([(T.Q4_K, 2112)], 256, "add")),
    ("8B qkv 6144x4096 Q4_K Q4_K Q6_K", ([(T.Q4_K, 4096), (T.Q4_K, 1024), (T.Q6_K, 1024)], 4096, "norm")),
    ("8B o 4096x4096 Q4_K", ([(T.Q4_K, 4096)], 4096, "add")),
    ("8B gate/up 28672x4096 Q4_K", ([(T.Q4_K, 14336)], 4096, "pair")),
    ("8B down 4096x14336 Q4_K", ([(T.Q4_K, 4096)], 14336, "add")),
    ("8B down 4096x14336 Q6_K", ([(T.Q6_K, 4096)], 14336, "add")),
    ("8B head 128256x4096 Q6_K", ([(T.Q6_K, 128256)], 4096, "norm")),
    ("1B qkv 3072x2048 Q4_K Q4_K Q6_K", ([(T.Q4_K, 2048), (T.Q4_K, 512), (T.Q6_K, 512)], 2048, "norm")),
    ("1B o 2048x2048 Q4_K", ([(T.Q4_K, 2048)], 2048, "add")),
    ("1B gate/up 16384x2048 Q4_K", ([(T.Q4_K, 8192)], 2048, "pair")),
    ("1B down 2048x8192 Q6_K", ([(T.Q6_K, 2048)], 8192, "add")),
    ("1B head 128256x2048 Q6_K", ([(T.Q6_K, 128256)], 2048, "norm")),
]


def shapes(ceiling: float) -> None:
    """Every main shape for 1 sequence; some for more; every format on one shape."""
    for name, group in MAIN:
        time, speed = time_group(group)
        print(f"{name:34} {time:8.2f} us {speed:7.0f} GB/s {100 * speed / ceiling:5.1f} %", flush=True)
    for batch in (2, 4, 8):
        for name, group in MAIN[2:5]:
            time, speed = time_group(group, batch)
            print(
                f"{name:34} {time:8.2f} us {speed:7.0f} GB/s {100 * speed / ceiling:5.1f} %  {batch} sequences",
                flush=True,
            )
    for type in LAYOUTS:
        time, speed = time_group(([(type, 14336)], 4096, "pair"))
        print(
            f"gate/up 28672x4096 {type.name:15} {time:8.2f} us {speed:7.0f} GB/s {100 * speed / ceiling:5.1f} %",
            flush=True,
        )


def tune(ceiling: float) -> None:
    """Block shapes on the main matrices, microseconds."""
    options = [
        Tuning(*option)
        for option in (
            (16, 8, 2, 1, 1),
            (16, 8, 2, 1, 2),
            (16, 8, 2, 2, 1),
            (16, 8, 3, 1, 1),
            (16, 4, 2, 1, 1),
            (16, 16, 2, 1, 1),
            (8, 8, 4, 2, 1),
        )
    ]
    print("block shape (warps, split, depth, blocks, early):", *(astuple(option) for option in options))
    for name, group in MAIN:
        cells = []
        for option in options:
            try:
                cells.append(f"{time_group(group, 1, option)[0]:8.2f}")
            except Exception as error:
                cells.append(f"{type(error).__name__[:8]:>8}")
        print(f"{name:34}", *cells, flush=True)


def more_bits(layer: int, layers: int) -> bool:
    """Which layers of a Q4_K_M file take Q6_K for attn_v and ffn_down."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


MODELS = {"8B": (32, 4096, 4096, 1024, 14336), "1B": (16, 2048, 2048, 512, 8192)}


def step_groups(model: str, mix: str) -> list[Group]:
    """All products of one decode step."""
    layers, width, q, kv, ffn = MODELS[model]
    groups: list[Group] = []
    for layer in range(layers):
        low = T.Q4_K if mix == "Q4_K_M" else T.Q8_0
        high = T.Q6_K if mix == "Q4_K_M" and more_bits(layer, layers) else low
        groups += [
            ([(low, q), (low, kv), (high, kv)], width, "norm"),
            ([(low, width)], q, "add"),
            ([(low, ffn)], width, "pair"),
            ([(high, width)], ffn, "add"),
        ]
    return [*groups, ([(T.Q6_K if mix == "Q4_K_M" else T.Q8_0, 128256)], width, "norm")]


def time_step(model: str, mix: str, batch: int, tuning: Tuning | None, operand: Any) -> tuple[float, float]:
    """Milliseconds of all projections of a step in one graph, and their GB/s."""
    products = [launcher(group, batch, tuning, operand) for group in step_groups(model, mix)]
    graph, stream = capture(lambda: run_all(call for _, call in products))
    time = milliseconds(graph, stream)
    return time, sum(product.n_bytes for product, _ in products) / time / 1e6


def step(ceiling: float, batches: Sequence[int] = (1, 4), tuning: Tuning | None = None) -> None:
    """All projections of one decode step, in one graph."""
    for model in MODELS:
        for mix in ("Q4_K_M", "Q8_0"):
            for batch in batches:
                cupy.get_default_memory_pool().free_all_blocks()
                time, speed = time_step(model, mix, batch, tuning, None)
                print(
                    f"{model} {mix:7} {batch} sequences: {time:7.3f} ms {speed:6.0f} GB/s "
                    f"{100 * speed / ceiling:5.1f} %",
                    flush=True,
                )


def many(ceiling: float) -> None:
    """Both families for 1 to 256 sequences: microseconds of the main shapes, milliseconds of whole steps."""
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    operand = cupy.empty(operand_bytes(14336), cupy.uint8)
    card = (device_arch(), int(cupy.cuda.Device().attributes["MultiProcessorCount"]))
    jobs = []
    for parts, columns, kind in [group for _, group in MAIN] + step_groups("8B", "Q8_0") + step_groups("1B", "Q8_0"):
        activation = KernelActivation.SILU if kind == "pair" else KernelActivation.NONE
        chooser = Chooser(Card(*card), deterministic=False)
        matrices = [Matrix("", type, rows, columns, "" if kind == "pair" else None) for type, rows in parts]
        product = chooser.product(matrices, activation=activation)
        for batch in batches:
            step = Step(Phase.DECODE, batch, chooser.card, batch, (), KernelActivation.NONE, fixed_rows=True)
            for family in product.families.used & {Family.MATVEC, Family.DECODE_GEMM}:
                jobs += [launch.job for launch in step.decode_product(product, family) if launch.job is not None]
    prebuild(list({repr(job): job for job in jobs}.values()), card[0])
    ways = (("8 at a time", batches[:6], None), ("64 at a time", batches, operand))
    print("columns: sequences", *batches)
    for name, group in MAIN[1:]:
        for way, some, scratch in ways:
            cells = [time_group(group, batch, None, scratch) for batch in some]
            print(
                f"{name:34} {way:12} us  ",
                *(f"{time:8.2f}" for time, _ in cells),
                f" {cells[0][1]:5.0f} GB/s for one",
            )
            cupy.get_default_memory_pool().free_all_blocks()
    for model in MODELS:
        for mix in ("Q4_K_M", "Q8_0"):
            for way, some, scratch in ways:
                steps = [time_step(model, mix, batch, None, scratch)[0] for batch in some]
                print(f"{model} {mix:7} step, {way:12} ms  ", *(f"{time:8.3f}" for time in steps), flush=True)


def sane_matrix(type: T, rows: int, columns: int, paired: bool = False) -> PackedMatrix:
    """As random_matrix, but of numbers of a usual size."""
    rng = np.random.default_rng(rows)
    parts = [cupy.asarray(random_rows(rng, type, rows, columns).reshape(-1)) for _ in range(1 + paired)]
    return repack(parts[0], type, rows, columns, partner=parts[1] if paired else None)


def feed(pair: Sequence[DecodeGemm], way: str, arrays: Sequence[Any], words: Any, options: dict[str, Any]) -> None:
    """Gate and up, then down, of handover()."""
    x, hidden, out, left, between = arrays
    pair[0](x, hidden, left, ready=True, halves=(between, words) if way == "halves" else None, **options)
    pair[1](hidden, out, between, ready=way != "converted")


def handover(ceiling: float) -> None:
    """Microseconds of gate and up and down, of a layer, in a chain of all layers of a model.

    The operand of down is converted by a kernel of its own, left by halves, or taken as it is from an earlier launch,
    which is what nothing can be faster than. All three ways in turn, twice.
    """
    processors = multiprocessor_count(cupy.cuda.Device().id)
    ways = ("converted", "halves", "taken")
    for model, (layers, width, _, _, ffn) in MODELS.items():
        gate_up = sane_matrix(T.Q4_K, ffn, width, paired=True)
        downs = {type: sane_matrix(type, width, ffn) for type in (T.Q4_K, T.Q6_K)}
        pairs = []
        for i in range(layers):
            matrices = gate_up, downs[T.Q6_K if more_bits(i, layers) else T.Q4_K]
            pairs.append([DecodeGemm([replace(one, data=cupy.array(one.data))], processors) for one in matrices])
        assert all(first.emits_halves for first, _ in pairs)
        words, norm = cupy.zeros(word_count(ffn), cupy.int32), cupy.full(width, 0.01, cupy.float32)
        for batch in (32, 64):
            x = cupy.random.standard_normal((batch, width), cupy.float32)
            hidden, out = (cupy.zeros((batch, size), cupy.float32) for size in (ffn, width))
            left, between = (cupy.zeros(operand_bytes(size), cupy.uint8) for size in (width, ffn))
            many = {"norm": norm, "eps": 1e-5, "activation": KernelActivation.SILU}
            pairs[0][0](x, hidden, left, **many)
            pairs[0][1](hidden, out, between)
            largest = cupy.abs(hidden).reshape(batch, -1, 256).max(axis=2)
            usual = 100 * float(((largest >= 2.0**-6) & (largest < 2.0**10)).mean())

            cells = []
            for way in ways * 2:
                arrays = (x, hidden, out, left, between)
                graph, stream = capture(
                    partial(run_all, [partial(feed, pair, way, arrays, words, many) for pair in pairs])
                )
                cells.append(f"{way} {milliseconds(graph, stream, 60) * 1e3 / layers:7.2f}")
            assert not words.any()
            print(
                f"{model} {batch} sequences, us a layer: ",
                ", ".join(cells),
                f"({usual:.1f} % of factors are 1)",
                flush=True,
            )
        pairs.clear()
        cupy.get_default_memory_pool().free_all_blocks()


def unpack(ceiling: float) -> None:
    """Packed to row-major, bytes read and written."""
    for type in LAYOUTS:
        matrix = random_matrix(type, 14336, 4096)
        cells = []
        for kind in ("float16", "float32"):
            out = cupy.empty((14336, 4096), kind)
            graph, stream = capture(partial(run_all, [partial(dequantize, matrix, out)] * 8))
            time = milliseconds(graph, stream) / 8
            cells.append(f"{kind} {time * 1e3:7.1f} us {(matrix.data.nbytes + out.nbytes) / time / 1e6:6.0f} GB/s")
        print(f"{type.name:5} 14336x4096 to", ", ".join(cells), flush=True)


def main() -> None:
    """Runs what the command line names."""
    wanted = sys.argv[1:] or ["check", "shapes", "step"]
    ceiling = read_bandwidth()
    print(f"{cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}: reads {ceiling:.0f} GB/s")
    cupy.get_default_memory_pool().free_all_blocks()
    good = True
    for name in wanted:
        if name == "check":
            good = check()
        elif name.startswith("step="):  # step=WARPS,SPLIT,DEPTH,BLOCKS,EARLY
            print(name)
            step(ceiling, (1,), Tuning(*map(int, name[5:].split(","))))
        else:
            {"shapes": shapes, "tune": tune, "step": step, "many": many, "handover": handover, "dequant": unpack}[name](
                ceiling
            )
        cupy.get_default_memory_pool().free_all_blocks()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
