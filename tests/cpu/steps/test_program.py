"""Compiled bricks and recorded decode steps against plain numpy, and against each other bit for bit."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from engine.cpu import reference
from engine.cpu.backend import CpuBackend
from engine.cpu.kernels import build, elementwise, stepping
from engine.cpu.kernels.machine import COUNTERS, REGIONS, Head
from engine.cpu.kernels.terms import has_pairs
from engine.cpu.products.integer import is_integer
from engine.cpu.steps import immediate, program, recorder
from engine.cpu.steps.immediate import Immediate
from engine.cpu.steps.operands import columns_step
from engine.cpu.steps.recorder import Recorder
from engine.cpu.threads import ThreadPool
from engine.errors import ContextFullError, InvalidRequestError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.batch import Batch, Outputs
from engine.model.config import Activation, FfnConfig, NormKind
from engine.model.loader import load_model
from engine.model.weights import Norm
from tests.support.models.gguf_builder import build_gguf, tiny_llama, tiny_llama_parts
from tests.support.models.small_models import CASES, TOKENS, all_logits, make, with_biases, with_experts


@pytest.fixture
def opened():
    backends = []

    def open_backend(path, **options):
        settings = {"threads": 2, "kv_type": "f32", "max_sequences": 4} | options
        backends.append(CpuBackend(load_model(open_gguf(path)), **settings))
        return backends[-1]

    yield open_backend
    for backend in backends:
        backend.close()
        backend.model.gguf.close()


def parts_for(kv_type, kind):
    """A model whose heads such a cache can hold."""
    width = 128 if kv_type == "q8_0" else 64
    return tiny_llama_parts(tokenizer=False, weight_type=kind, width=width, ffn=128, context_length=700)


def one(backend, slot, token, n_past):
    return backend.forward(Batch.build([(slot, [token], n_past, Outputs.LAST)]))


def by_bricks(backend, parts):
    """The same step without a program."""
    held, backend.__dict__["_programs"] = backend._programs, None
    try:
        return backend.forward(Batch.build(parts))
    finally:
        backend.__dict__["_programs"] = held


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_fast_and_plain_path_agree(tmp_path, opened, case):
    _, _, path = make(tmp_path, **case)
    plain, fast = opened(path, reference=True), opened(path)
    expected = all_logits(plain, TOKENS)
    # Sums in another order: about 1e-6 of logits whose spread is about 3.
    np.testing.assert_allclose(all_logits(fast, TOKENS), expected, atol=3e-5)
    single = [one(fast, 1, token, i) for i, token in enumerate(TOKENS)]
    np.testing.assert_allclose(np.concatenate(single), expected, atol=3e-5)


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0])
@pytest.mark.parametrize("bits", [None, 8, 16])
def test_prompts_as_programs_give_the_bits_of_bricks(tmp_path, opened, kind, kv_type, bits):
    """Beside decoding sequences, with logits of no, one and all rows, and of more rows than a program takes."""
    path = tmp_path / "tiny.gguf"
    meta, tensors = parts_for(kv_type, kind)
    path.write_bytes(build_gguf(meta, tensors))
    backend = opened(path, kv_type=kv_type, activation_bits=bits)
    integers = bits is not None and is_integer(kind, 64, bits)
    assert backend._programs.max_rows == (program.MAX_ROWS if integers else 8)
    rng = np.random.default_rng(2)
    for n_rows in (2, 7, 31, 65, 200, 512):
        first, second = (rng.integers(0, 270, n_rows // 2 + 1).tolist() for _ in range(2))
        for wanted in Outputs:
            parts = [
                (0, [5], n_rows, Outputs.LAST),
                (1, first, 100, wanted),
                (2, [9], 3, Outputs.LAST),
                (3, second, 0, Outputs.NONE),
            ]
            pages = [array for layer in backend.cache.layers for array in layer.paged]
            before = [array.copy() for array in pages]
            expected, written = by_bricks(backend, parts), [array.copy() for array in pages]
            for array, old in zip(pages, before, strict=True):
                array[...] = old
            np.testing.assert_array_equal(backend.forward(Batch.build(parts)), expected)
            for array, new in zip(pages, written, strict=True):
                np.testing.assert_array_equal(array, new)


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0])
def test_programs_give_the_bits_of_bricks(tmp_path, opened, kind, kv_type):
    path = tmp_path / "tiny.gguf"
    meta, tensors = parts_for(kv_type, kind)
    with_plain_biases(tensors)
    path.write_bytes(build_gguf(meta, tensors))
    backend = opened(path, kv_type=kv_type)
    assert backend._programs is not None
    rng = np.random.default_rng(1)
    for n_past in (1, 15, 16, 255, 256, 600):  # capacity grows between some of them
        for slot in range(4):
            all_logits(backend, rng.integers(0, 270, n_past + slot).tolist(), slot=slot)
        parts = [(slot, [7 + slot], n_past + slot, Outputs.LAST) for slot in range(4)]
        expected = by_bricks(backend, parts)
        np.testing.assert_array_equal(backend.forward(Batch.build(parts)), expected)
        for slot in (2, 0):
            np.testing.assert_array_equal(one(backend, slot, 7 + slot, n_past + slot), expected[[slot]])
        # As one row among many of a prompt.
        prompt = rng.integers(0, 270, 20).tolist()
        mixed = backend.forward(Batch.build([(3, prompt, 0, Outputs.NONE), *parts[:3]]))
        np.testing.assert_array_equal(mixed, expected[:3])


def test_rounded_activations_have_the_same_bits_in_programs(tmp_path, opened):
    """Of BF16 files where the processor multiplies such pairs; else in integers of 14 bits, as F16, or exactly."""
    found = {}
    for kind in (GGMLType.BF16, GGMLType.F16):
        path = tmp_path / f"{kind.name}.gguf"
        meta, tensors = tiny_llama_parts(tokenizer=False, weight_type=kind, ffn=128, context_length=700)
        path.write_bytes(build_gguf(meta, tensors))
        rounded, exact = opened(path, activation_bits=8), opened(path)
        logits = all_logits(rounded, TOKENS)
        single = [one(rounded, 1, token, i) for i, token in enumerate(TOKENS)]
        np.testing.assert_array_equal(np.concatenate(single), logits)
        expected = all_logits(exact, TOKENS)
        found[kind] = np.abs(logits - expected).max() / np.abs(expected).max()
    for kind, error in found.items():
        pairs = kind is GGMLType.BF16 and has_pairs()
        least, most = (1e-5, 2e-2) if pairs else (1e-7, 1e-3)
        assert (least < error < most) == (pairs or is_integer(kind, 64))


def with_plain_biases(tensors):
    rng = np.random.default_rng(5)
    for name in [name for name in tensors if name.startswith("blk") and "norm" not in name]:
        rows = tensors[name].shape[0] if isinstance(tensors[name], np.ndarray) else tensors[name][1][0]
        tensors[name.replace("weight", "bias")] = rng.normal(0, 0.3, rows).astype(np.float32)


def test_threads_change_nothing(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_FLOATS", 64)
    monkeypatch.setattr(immediate, "TASK_FLOATS", 64)
    _, _, path = make(tmp_path, change=with_biases)
    results = []
    for threads in (1, 2, 3, 9):
        backend = opened(path, threads=threads)
        results.append([all_logits(backend, TOKENS), *(one(backend, 0, t, len(TOKENS) + t) for t in range(50))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 11])
def test_every_item_once_from_any_thread(threads, monkeypatch):
    """Whichever thread comes first does all items and nothing beyond them; those after it find nothing left."""
    monkeypatch.setattr(recorder, "CHUNK_FLOATS", 16)
    x = np.arange(60 * 16, dtype=np.float32).reshape(60, 16)
    out = np.full((2, 61, 16), np.nan, np.float32)
    with ThreadPool(threads) as pool:
        steps, counts = Recorder(pool), (1, 2, 3, 5, 8, 60)
        for n in counts:
            steps.recur(columns_step(x[:n], 0, 16, out[0, :n]), out[0])
        steps.join()
        steps.recur(columns_step(out[0, :60], 0, 16, out[1, :60]), out[1])
        steps.join()
        table = steps.table()
    assert table[:, Head.REGIONS].tolist() == [min(n, threads, REGIONS) for n in (*counts, 60)]
    run, give_way = build.kernel("run_program"), program._give_way()
    for first in range(steps.regions):
        out[...] = np.nan
        counters = np.zeros((len(table), steps.regions, COUNTERS), np.int64)
        for thread in (first, *range(steps.regions)):
            where = table.ctypes.data, len(table), counters.ctypes.data, steps.regions, thread
            run(*where, 0, give_way)
            for part in out:
                np.testing.assert_array_equal(part[:60], x)
                assert np.isnan(part[60]).all()
        np.testing.assert_array_equal(counters[:, :, 1].sum(1), table[:, Head.CHUNKS] * table[:, Head.REGIONS])


def test_experts_are_not_recorded(tmp_path, opened):
    _, _, path = make(tmp_path, metadata=CASES["experts"]["metadata"], change=with_experts)
    assert opened(path)._programs is None
    assert opened(path, reference=True)._programs is None


def test_programs_refuse_what_bricks_refuse(tmp_path, opened):
    _, _, path = make(tmp_path)
    backend = opened(path, context_length=len(TOKENS) + 1)
    all_logits(backend, TOKENS)
    one(backend, 0, 5, len(TOKENS))
    with pytest.raises(ContextFullError):
        one(backend, 0, 5, len(TOKENS) + 1)
    with pytest.raises(InvalidRequestError, match="token id 272"):
        one(backend, 0, 272, 3)


def test_programs_follow_a_reused_slot(tmp_path, opened):
    _, _, path = make(tmp_path)
    backend = opened(path)
    for _ in range(3):
        all_logits(backend, TOKENS)
        first = one(backend, 0, 9, len(TOKENS))
        all_logits(backend, TOKENS[::-1])
        all_logits(backend, TOKENS, slot=1)
        np.testing.assert_array_equal(one(backend, 1, 9, len(TOKENS)), first)
        assert not np.array_equal(one(backend, 0, 9, len(TOKENS)), first)


@pytest.mark.parametrize("slots", [range(9), [18, 3, 4, 17, 0, 9, 11, 8, 15, 2, 1], range(19, 2, -1)])
def test_more_rows_than_a_program_has(tmp_path, opened, slots):
    """In any order of slots, each row as in a step of its own; refused all together or not at all."""
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=20)
    for slot in slots:
        all_logits(backend, TOKENS[: 1 + slot % 5], slot=slot)
    parts = [(slot, [10 + slot], 1 + slot % 5, Outputs.LAST) for slot in slots]
    with pytest.raises(InvalidRequestError, match="token id 272"):
        backend.forward(Batch.build([*parts[:-1], (parts[-1][0], [272], *parts[-1][2:])]))
    together = backend.forward(Batch.build(parts))
    alone = [one(backend, slot, 10 + slot, 1 + slot % 5) for slot in slots]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_programs_are_few(tmp_path, opened, monkeypatch):
    """Those are kept that ran last."""
    monkeypatch.setattr(program, "KEPT_ROWS", 5)
    _, _, path = make(tmp_path)
    backend = opened(path)
    for n in (1, 2, 3, 1, 4, 2, 1, 9):
        backend.forward(Batch.build([(slot, [3], 0, Outputs.LAST) for slot in range(min(n, 4))]))
        shapes = [shape.rows for shape in backend._programs._programs]
        assert shapes[-1] == min(n, 4)
        assert sum(shapes) <= 5


def test_an_interrupt_waits_for_the_other_thread(tmp_path, opened, monkeypatch):
    """After an interrupt no thread uses the program's buffers any more, and the step can be repeated."""
    _, _, path = make(tmp_path)
    backend = opened(path)
    all_logits(backend, TOKENS)
    expected = one(backend, 0, 9, len(TOKENS))
    started, go, over = threading.Event(), threading.Event(), threading.Event()
    kernel = build.kernel("run_program")

    def slow(*arguments):
        if threading.current_thread() is threading.main_thread():
            started.wait(10)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt
        started.set()
        go.wait(10)
        kernel(*arguments)
        over.set()

    monkeypatch.setitem(build._kernels, ("run_program", "F32"), slow)
    with pytest.raises(KeyboardInterrupt):
        one(backend, 0, 9, len(TOKENS))
    assert over.is_set()
    monkeypatch.undo()
    np.testing.assert_array_equal(one(backend, 0, 9, len(TOKENS)), expected)


@pytest.mark.parametrize("native", [True, False])
def test_float16_is_written_as_numpy_does(native, monkeypatch):
    """Ties, subnormals, overflow and signs; NaN stays NaN."""
    from numba import njit, types

    if not native:
        monkeypatch.setattr(stepping, "has_native_half", lambda _: False)
    store = njit(nogil=True)(build._MAKERS["rotate_store"]("F16"))
    store.compile(types.void(*elementwise.ARGUMENTS["rotate_store"]))
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)  # the last is infinite
    between = (halves[:-1] + halves[1:]) / 2  # halfway, where evenness decides
    near = np.concatenate([np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(np.inf))])
    others = np.array([65519.0, 65520.0, 1e9, 1e-9, 1e-40, np.nan], np.float32)
    values = np.concatenate([halves, between, near, others])
    values = np.concatenate([values, -values])
    values = np.resize(values, -(-values.size // 16) * 16)
    out = np.empty(values.size, np.float16)
    pages = np.zeros(1, np.int64)
    rows = np.array([pages.ctypes.data, 0])
    operands = np.array([values.ctypes.data, 1, values.size, 0, 0, 0, 0, 0, 0, out.ctypes.data, rows.ctypes.data, 0])
    store(operands.ctypes.data, 0, 1, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(np.float16)
    nan = np.isnan(values)
    assert np.isnan(out[nan]).all()
    np.testing.assert_array_equal(out.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


def gelu(x):
    """In float64, of float16 and rounded to float16 up to 10; beyond, the larger of x and 0."""
    half = x.astype(np.float16).astype(np.float64)
    inside = 0.5 * half * (1 + np.tanh(np.sqrt(2 / np.pi) * (half + 0.044715 * half**3)))
    return np.where(np.abs(x) >= 10, np.maximum(x, 0), inside.astype(np.float16))


ACTIVATIONS = {
    Activation.SILU: lambda x, y: x / (1 + np.exp(-x)) * y,
    Activation.GELU: lambda x, y: gelu(x) * y,
    Activation.RELU: lambda x, y: np.maximum(x, 0) * y,
    Activation.RELU_SQUARED: lambda x, y: np.maximum(x, 0) ** 2 * y,
    Activation.SWIGLU_CLAMPED: lambda x, y: (
        np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))) * (np.clip(y, -7, 7) + 1)
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x = np.concatenate([np.linspace(-120, 120, 4000), np.linspace(-4, 4, 4000), [0.0, 1e-30, -1e-30, np.inf, np.nan]])
    x = np.resize(x.astype(np.float32), 8016)
    y = np.resize(np.linspace(-9, 9, 700).astype(np.float32), x.shape)
    out = np.empty_like(x)
    with np.errstate(over="ignore", invalid="ignore"):
        want = ACTIVATIONS[activation](x.astype(np.float64), y.astype(np.float64))
        plain = reference.gated(x.copy(), y.copy(), FfnConfig(width=16, activation=activation))
    operands = np.array([x.ctypes.data, y.ctypes.data, out.ctypes.data, 0])
    build.kernel("gate", activation.name)(operands.ctypes.data, 0, x.size // 16, 0)
    # Neighbouring float16s differ by 2^-11 of their size; a result near the middle of two may go either way. Below its
    # normal range they differ by 2^-24.
    tolerance, floor = (2**-10, 2**-23) if activation is Activation.GELU else (3e-6, 1e-30)
    for found in (out, plain):
        np.testing.assert_allclose(found, want, rtol=tolerance, atol=floor * np.abs(y).max())
    if activation is Activation.GELU:
        finite = np.isfinite(want)
        away = np.abs(out[finite] - want[finite]) > 1e-5 * np.abs(want[finite]) + 1e-30
        assert away.mean() < 0.01


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", list(NormKind))
def test_norms(kind, heads):
    rng = np.random.default_rng(3)
    x = rng.normal(2.0, 3.0, (5, heads, 48)).astype(np.float32)
    residual = rng.normal(0, 1, x.shape).astype(np.float32)
    weight, bias = (rng.normal(0, 1, (heads, 48)).astype(np.float32) for _ in range(2))
    wide = x.astype(np.float64)
    if kind is NormKind.LAYER:
        wide -= wide.mean(-1, keepdims=True)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
    with ThreadPool(1) as pool:
        steps = Immediate(pool)
        for norm, want in (
            (Norm(kind, 1e-3, weight, bias), normed * weight + bias),
            (Norm(kind, 1e-3, weight), normed * weight),
            (Norm(kind, 1e-3, None), normed),
        ):
            np.testing.assert_allclose(steps.normalize("", x, norm), want, rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(reference.normalize(x, norm), want, rtol=1e-5, atol=2e-6)
            summed = steps.normalize("", x, norm, residual=residual, factor=0.5)
            np.testing.assert_allclose(summed, residual + 0.5 * want, rtol=1e-5, atol=2e-6)


MEMORY_SCRIPT = """
import sys
import numpy as np
from engine.cpu.backend import CpuBackend
from engine.cpu.products.matmul import warm_up
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.config import Activation, FfnConfig, NormKind
from engine.model.loader import load_model
from engine.model.weights import Norm

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

with open_gguf(sys.argv[1]) as gguf:
    backend = CpuBackend(load_model(gguf), threads=2)
    warm_up(backend.weight_types, kv_type="f16")
    before = peak()
    backend.forward(Batch.build([(0, np.arange(400) % 256, 0, Outputs.LAST)]))
    for n_past in range(400, 405):
        backend.forward(Batch.build([(0, [7], n_past, Outputs.LAST)]))
    print(peak() - before)
    backend.close()
    del backend
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_are_never_expanded(tmp_path):
    """A prompt and decode steps take the file, which is mapped, and little more."""
    path = tmp_path / "model.gguf"
    options = {"n_layers": 3, "width": 1024, "heads": 8, "kv_heads": 2, "ffn": 3072, "context_length": 512}
    tiny_llama(path, tokenizer=False, weight_type=GGMLType.F16, **options)
    n_bytes = path.stat().st_size
    assert n_bytes > 60 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    # One layer of floats has 48 MB, all of them 144 MB; activations of 400 rows take about 10 MB.
    assert int(done.stdout) < n_bytes + (40 << 20)
