"""Integer products: every format against the gguf package, all loops against each other, bit for bit."""

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir as llvm_ir
from numba import njit, types
from numba.core import cgutils

from engine.cpu.backend import CpuBackend
from engine.cpu.kernels import build, isa, processor
from engine.cpu.kernels.emit import I8, I16, I32, I64, vector
from engine.cpu.kernels.integer.activations import LINES, SHIFT, Form
from engine.cpu.kernels.integer.panels import PANELS
from engine.cpu.kernels.integer.tiles import LONG_ROW
from engine.cpu.memory import array_address
from engine.cpu.products import integer
from engine.cpu.products.integer import (
    IntegerWeights,
    dot_kind,
    is_integer,
    n_items,
)
from engine.cpu.products.matmul import prepare
from engine.cpu.steps import immediate, recorder
from engine.cpu.steps.immediate import Immediate
from engine.cpu.threads import ThreadPool
from engine.errors import InvalidRequestError
from engine.gguf.quants import GGMLType
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from engine.model.weights import Linear, Weight
from tests.support.integer_products import floats, form_of, integers, llvm_of, packed, product, quantized
from tests.support.models.gguf_builder import tiny_llama
from tests.support.weights import SCALES

HOST = processor.usable(processor.host())

SIXTEEN = [name for name, panel in PANELS.items() if not panel.wide]
"""Formats that are multiplied in integers where activations have 16 bits."""


@pytest.fixture(scope="module")
def pool():
    with ThreadPool(2) as two:
        yield two


def test_all_sizes_are_those_of_the_formats():
    for name, panel in PANELS.items():
        numbers = 64 if panel.wide else 1
        sizes = GGMLType[name].block_size * numbers, GGMLType[name].type_size * numbers
        assert (panel.block_size, panel.type_size) == sizes
    assert set(SCALES) == set(PANELS)


@pytest.mark.parametrize("form", Form)
def test_quantized_activations(form):
    rng = np.random.default_rng(3)
    sizes = np.float32(10.0) ** rng.integers(-20, 20, (5, 3)).astype(np.float32)
    x = rng.standard_normal((5, 96)).astype(np.float32) * sizes.repeat(32, axis=1)
    x[0, :32] = 0
    x[1, 32:64] = 1e-39
    x[2, 5] = x[2, :32].max() * 2
    out, values = quantized(x, form)
    largest = np.abs(x.reshape(5, 3, 32)).max(-1, keepdims=True)
    top = LINES[form.bits].largest
    # Half a step, and a little for the rounding of the scale; what is too small for an inverse becomes 0.
    error = np.abs(x.reshape(5, 3, 32) - values.reshape(5, 3, 32))
    assert (error <= np.maximum(largest / (2 * top) * 1.0001 + largest * 1e-7, 2e-30)).all()
    q = integers(out, form)
    parts = (q, q[:, :, :16], q[:, :, 16:])
    scale = out[:, :, 32 if form.bits == 8 else 64 :][:, :, :4].copy().view(np.float32)[:, :, 0]
    sums = floats(out, form, 1, 3)
    for place, part in enumerate(parts):
        np.testing.assert_array_equal(sums[:, :, place], part.sum(-1).astype(np.float32) * scale)
        counts = floats(out, form, 4 + place, 1, np.int32)[:, :, 0]
        if form.bits == 8:  # columns 0, 1, 4, 5, ..., and the others
            halves = out[:, :, 48 + 4 * place :][:, :, :4].copy().view(np.int16).astype(np.int64)
            pairs = part.reshape(*part.shape[:2], -1, 2, 2).sum((2, 4))
            np.testing.assert_array_equal(halves, pairs)
            counts = halves.sum(-1)
        np.testing.assert_array_equal(counts, part.sum(-1))
    assert np.abs(q).max() == top
    if form.bits == 8:  # exact, so that a shifted sum times the scale is rounded once
        np.testing.assert_array_equal(floats(out, form, 7)[:, :, 0], -SHIFT * scale.astype(np.float64))
    if form is Form.SPLIT:
        np.testing.assert_array_equal(q, integers(quantized(x, Form.PAIRS)[0], Form.PAIRS))


@pytest.mark.parametrize(("name", "bits"), [*((name, 8) for name in PANELS), *((name, 16) for name in SIXTEEN)])
def test_every_format(name, bits, pool, monkeypatch):
    """All loops give the same bits, and what float64 gives for the quantized activations."""
    monkeypatch.setattr(integer, "has_pairs", lambda: False)  # BF16 as integers also where it is not
    block = PANELS[name].block_size
    for rows, blocks in ((1, 1), (7, 3), (16, 2), (41, 9 if block == 32 else 3)):
        w, truth = packed(name, rows, block * blocks)
        plain, repacked = IntegerWeights(pool, bits), IntegerWeights(pool, bits)
        repacked.repack(w)
        assert repacked.takes(prepare(w))
        assert plain.takes(prepare(w)) == is_integer(GGMLType[name], block * blocks, repack=False)
        assert repacked.n_bytes == -(-rows // 8) * 8 * blocks * PANELS[name].row_bytes
        x = np.random.default_rng(rows).standard_normal((70, block * blocks)).astype(np.float32)
        both = {kind: quantized(x, form_of(bits, HOST[0], kind, name)) for kind in ("dot_panels", "tile_panels")}
        values = both["tile_panels"][1]
        np.testing.assert_array_equal(both["dot_panels"][1], values)
        expected = product(repacked, w, both["tile_panels"][0], "tile_panels", HOST[0])
        magnitude = np.abs(values) @ np.abs(truth).T
        # The offset of a format may be summed apart from the rest, so the terms are larger than the products.
        assert (np.abs(expected - values @ truth.T) <= 3e-6 * magnitude + 1e-30).all()
        for n_tokens in (1, 2, 5, 64, 65):
            # Without a copy only what comes before the product differs, so a few formats are enough for 16 bits.
            for weights in (plain, repacked) if bits == 8 or name in ("Q4_K", "Q8_0", "NVFP4") else (repacked,):
                for kind, (blocks_of_x, _) in both.items():
                    got = product(weights, w, blocks_of_x, kind, HOST[0], n_tokens)
                    np.testing.assert_array_equal(got, expected[:n_tokens])


def test_long_rows_are_multiplied_by_fewer_at_once(pool):
    w, _ = packed("Q4_0", 9, 6176)
    weights = IntegerWeights(pool, 8)
    x = np.random.default_rng(5).standard_normal((70, 6176)).astype(np.float32)
    assert LONG_ROW < 64 * 6176 / 32
    both = {kind: quantized(x, form_of(8, HOST[0], kind, "Q4_0"))[0] for kind in ("dot_panels", "tile_panels")}
    found, expected = (product(weights, w, both[kind], kind, HOST[0]) for kind in ("tile_panels", "dot_panels"))
    np.testing.assert_array_equal(found, expected)


def with_bits(*names):
    """Formats and bits of activations that they are multiplied with."""
    return [(name, bits) for name in names for bits in ((8,) if PANELS[name].wide else (8, 16))]


@pytest.mark.parametrize(
    ("name", "bits"),
    with_bits("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "Q5_0", "IQ2_S", "IQ1_M", "IQ3_S", "IQ3_XXS", "NVFP4", "F16"),
)
@pytest.mark.parametrize("instructions", HOST[1:])
def test_instruction_sets_agree(name, instructions, bits, pool):
    """The integers are exact, and floats are added in the same order, so all instruction sets give the same bits."""
    w, truth = packed(name, 19, 512)
    weights = IntegerWeights(pool, bits)
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    for kind in ("dot_panels", "tile_panels"):
        blocks, values = quantized(x, form_of(bits, instructions, kind, name))
        got = product(weights, w, blocks, kind, instructions)
        assert (np.abs(got - values @ truth.T) <= 3e-6 * np.abs(values) @ np.abs(truth).T).all()
        blocks, _ = quantized(x, form_of(bits, HOST[0], kind, name))
        np.testing.assert_array_equal(got, product(weights, w, blocks, kind, HOST[0]))


def test_scale_bias_and_residual(pool):
    rng = np.random.default_rng(2)
    w, truth = packed("Q4_K", 21, 256)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    bias, residual = rng.standard_normal(21).astype(np.float32), rng.standard_normal((6, 21)).astype(np.float32)
    weights = IntegerWeights(pool, 8)
    for kind in ("dot_panels", "tile_panels"):
        blocks, values = quantized(x, form_of(8, HOST[0], kind, "Q4_K"))
        got = product(weights, w, blocks, kind, HOST[0], scale=0.25, bias=bias, residual=residual)
        np.testing.assert_allclose(got, 0.25 * (values @ truth.T) + bias + residual, rtol=1e-4, atol=1e-4)


def test_experts_have_copies_of_their_own(pool):
    rng = np.random.default_rng(4)
    matrices = [packed("Q4_0", 12, 64 + 0 * i)[0].raw for i in range(3)]
    raw = np.stack([rng.permutation(m) for m in matrices])
    stack = Weight("stack", GGMLType.Q4_0, (3, 12, 64), raw)
    plain, repacked = IntegerWeights(pool, 8), IntegerWeights(pool, 8)
    repacked.repack(stack)
    x, _ = quantized(rng.standard_normal((3, 64)).astype(np.float32), form_of(8, HOST[0], "tile_panels", "Q4_0"))
    for expert in range(3):
        w = stack.expert(expert)
        assert repacked.kernel_type(prepare(w)) != plain.kernel_type(prepare(w))
        expected = product(plain, w, x, "tile_panels", HOST[0])
        np.testing.assert_array_equal(product(repacked, w, x, "tile_panels", HOST[0]), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_threads_and_other_rows_change_nothing(bits, pool, monkeypatch):
    monkeypatch.setattr(immediate, "TASK_FLOATS", 1)
    w, _ = packed("Q6_K", 130, 512)
    x = np.random.default_rng(5).standard_normal((70, 512)).astype(np.float32)
    linear = Linear(w)
    with ThreadPool(1) as one:
        whole = Immediate(one, IntegerWeights(one, bits)).linear("y", x, linear)
    for tokens in (1, 2, 3, 33, 70):
        got = Immediate(pool, IntegerWeights(pool, bits)).linear("y", x[-tokens:], linear)
        np.testing.assert_array_equal(got, whole[-tokens:])
    assert Immediate(pool, IntegerWeights(pool, bits)).linear("y", x[:0], linear).shape == (0, 130)


@pytest.mark.parametrize(
    ("weight_type", "repack", "bits", "noise"),
    [
        # 8 bits per activation: about half a percent of noise in every product.
        (GGMLType.Q8_0, True, 8, 2e-3),
        (GGMLType.Q8_0, False, 8, 2e-3),
        (GGMLType.Q8_0, True, 16, 1e-7),
        (GGMLType.Q8_0, False, 16, 1e-7),
        (GGMLType.F16, True, 8, 1e-6),  # with one matrix, of 96 columns, in float32
    ],
)
def test_decode_steps_give_the_bits_of_prompts(tmp_path, weight_type, repack, bits, noise, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_FLOATS", 64)
    path = tmp_path / "tiny.gguf"
    tiny_llama(path, tokenizer=False, weight_type=weight_type, width=64, ffn=96)
    tokens = np.random.default_rng(0).integers(0, 250, 20).astype(np.int32)
    with open_gguf(path) as gguf_file:
        model = load_model(gguf_file)
        fast = CpuBackend(model, threads=2, max_sequences=3, kv_type="f32", activation_bits=bits, repack=repack)
        plain = CpuBackend(model, threads=2, max_sequences=3, kv_type="f32")
        assert (fast.memory_plan().repacked_bytes > 0) == repack
        at_once = fast.forward(Batch.build([(0, tokens, 0, Outputs.ALL)]))
        single = [fast.forward(Batch.build([(1, [token], i, Outputs.ALL)]))[0] for i, token in enumerate(tokens)]
        np.testing.assert_array_equal(np.stack(single), at_once)
        fast.forward(Batch.build([(0, tokens[:9], 0, Outputs.NONE), (1, tokens[:7], 0, Outputs.NONE)]))
        both = fast.forward(Batch.build([(0, tokens[9:10], 9, Outputs.ALL), (1, tokens[7:8], 7, Outputs.ALL)]))
        np.testing.assert_array_equal(both, at_once[[9, 7]])
        expected = plain.forward(Batch.build([(0, tokens, 0, Outputs.ALL)]))
        assert 0 < ((at_once - expected) ** 2).mean() < noise * (expected**2).mean()
        fast.close()
        plain.close()


def test_one_input_in_two_forms(pool):
    """Weights of several types beside each other have activations of their own."""
    x = np.random.default_rng(6).standard_normal((3, 128)).astype(np.float32)
    matrices = [packed(name, 24, 128)[0] for name in ("Q8_0", "F16", "Q4_0")]
    weights = IntegerWeights(pool, 8)
    for w in matrices:
        weights.repack(w)
    expected = [Immediate(pool, weights).linear("y", x, Linear(w)) for w in matrices]
    together = Immediate(pool, weights)
    for w, one in zip(matrices * 2, expected * 2, strict=True):
        np.testing.assert_array_equal(together.linear("y", x, Linear(w)), one)
    recording = recorder.Recorder(pool, weights)
    buffer = recording.empty("x", x.shape)
    for w in matrices:
        recording.linear(w.name, buffer, Linear(w))
    kinds = [row[0] for row in recording.rows]
    assert kinds.count(build.address("quantize")) == 2  # Q8_0 and Q4_0 share theirs


@pytest.mark.parametrize("repack", [True, False])
def test_short_numbers_need_whole_blocks_and_a_copy(pool, repack):
    """F16 is multiplied in float32 without a copy, beside activations of 16 bits, and where a block is not whole."""
    whole, part = packed("F16", 8, 128)[0], Weight("part", GGMLType.F16, (8, 96), np.zeros((8, 192), np.uint8))
    for w, bits, taken in ((whole, 8, repack), (whole, 16, False), (part, 8, False)):
        weights = IntegerWeights(pool, bits)
        if repack:
            weights.repack(w)
        assert weights.takes(prepare(w)) == taken
        assert (weights.n_bytes > 0) == taken


def test_weights_that_are_not_finite_give_nothing_finite(pool):
    w, _ = packed("F16", 9, 128)
    w.raw.view(np.float16)[2, 70], w.raw.view(np.float16)[5, 3] = np.inf, np.nan
    weights = IntegerWeights(pool, 8)
    weights.repack(w)
    for rows in (1, 2):
        y = Immediate(pool, weights).linear("y", np.ones((rows, 128), np.float32), Linear(w))
        assert (np.isfinite(y) == ~np.isin(np.arange(9), (2, 5))).all()


def emulated(e, name, result, *arguments):
    """isa.call() with instructions that this machine lacks written out, as their manuals define them."""
    b = e.builder
    if "vpdpwssd" in name:
        total, weights, x = arguments
        pairs = [b.bitcast(part, vector(I16, 2 * total.type.count)) for part in (weights, x)]
        products = b.mul(*(b.sext(part, vector(I32, part.type.count)) for part in pairs))
        for column in range(2):
            parts = llvm_ir.Constant(total.type, [2 * lane + column for lane in range(total.type.count)])
            total = b.add(total, b.shuffle_vector(products, products, parts))
        return total
    if "vpdpbusd" in name or "sdot" in name:
        total, weights, x = arguments
        weights, x = (b.bitcast(part, vector(I8, 4 * total.type.count)) for part in (weights, x))
        wide = vector(I32, weights.type.count)
        left = b.zext(weights, wide) if "vpdpbusd" in name else b.sext(weights, wide)
        products = b.mul(left, b.sext(x, wide))
        lanes = range(total.type.count)
        for column in range(4):
            parts = llvm_ir.Constant(vector(I32, total.type.count), [4 * lane + column for lane in lanes])
            total = b.add(total, b.shuffle_vector(products, products, parts))
        return total
    if "tbl1" in name:
        table, indices = arguments
        found = llvm_ir.Constant(table.type, [0] * 16)
        for lane in range(16):
            index = b.extract_element(indices, I32(lane))
            inside = b.icmp_unsigned("<", index, I8(16))
            one = b.extract_element(table, b.select(inside, index, I8(0)))
            found = b.insert_element(found, b.select(inside, one, I8(0)), I32(lane))
        return found
    if "smmla" in name:
        total, weights, x = arguments
        rows = [[b.extract_element(matrix, I32(byte)) for byte in range(16)] for matrix in (weights, x)]
        for lane in range(4):
            one = b.extract_element(total, I32(lane))
            for column in range(8):
                pair = rows[0][8 * (lane // 2) + column], rows[1][8 * (lane % 2) + column]
                one = b.add(one, b.mul(*(b.sext(byte, I32) for byte in pair)))
            total = b.insert_element(total, one, I32(lane))
        return total
    if "tile" in name or "tdp" in name:
        return tiles(e, name.rpartition(".")[2], *arguments)
    return CALL(e, name, result, *arguments)


def tiles(e, name, *arguments):
    """AMX's instructions on eight registers of 1024 bytes, and their sizes, in memory."""
    b = e.builder
    state = b.module.globals.get("tiles")
    if state is None:
        state = llvm_ir.GlobalVariable(b.module, llvm_ir.ArrayType(I8, 64 + 8 * 1024), "tiles")
        state.linkage, state.initializer = "internal", llvm_ir.Constant(state.value_type, None)
    sizes = b.ptrtoint(state, I64)

    def register(number):
        return e.at(sizes, 64 + 1024 * number.constant)

    def rows(number):
        return b.zext(e.load(sizes, I8, 48 + number.constant), I64)

    def width(number):
        return b.zext(e.load(sizes, I16, 16 + 2 * number.constant), I64)

    def place(start, row, stride, byte):
        return b.add(start, b.add(b.mul(row, stride), byte))

    def move(number, outside, stride, load):
        with cgutils.for_range(b, rows(number)) as row, cgutils.for_range(b, width(number)) as byte:
            there = place(b.ptrtoint(outside, I64), row.index, stride, byte.index)
            here = place(register(number), row.index, I64(64), byte.index)
            e.store(e.load(there if load else here, I8), here if load else there)

    if name == "ldtilecfg":
        for part in range(0, 64, 8):
            e.store(e.load(b.ptrtoint(arguments[0], I64), I64, part), sizes, part)
    elif name == "tilezero":
        for part in range(0, 1024, 8):
            e.store(I64(0), register(arguments[0]), part)
    elif name in ("tileloadd64", "tilestored64"):
        move(*arguments, name == "tileloadd64")
    elif name == "tdpbssd":
        sums, left, right = arguments
        ranges = rows(sums), b.udiv(width(sums), I64(4)), rows(right), I64(4)
        with ExitStack() as stack:
            m, n, k, byte = (stack.enter_context(cgutils.for_range(b, count)).index for count in ranges)
            total = place(register(sums), m, I64(64), b.mul(n, I64(4)))
            a = e.load(place(register(left), m, I64(64), b.add(b.mul(k, I64(4)), byte)), I8)
            c = e.load(place(register(right), k, I64(64), b.add(b.mul(n, I64(4)), byte)), I8)
            e.store(b.add(e.load(total, I32), b.mul(b.sext(a, I32), b.sext(c, I32))), total)
    else:
        assert name == "tilerelease"


CALL = isa.call


@pytest.mark.parametrize(
    ("name", "bits", "instructions"),
    [
        *((name, 8, "amx") for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "Q2_K", "Q3_K", "IQ4_XS", "NVFP4")),
        *((*each, "vnni512") for each in with_bits("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "NVFP4", "F16")),
        *((*each, "vnni") for each in with_bits("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "IQ3_XXS", "NVFP4", "F16")),
        *((name, 8, "i8mm") for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "Q2_K", "IQ4_XS", "NVFP4")),
        *((*each, "neon") for each in with_bits("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "IQ3_XXS", "NVFP4")),
    ],
)
def test_arithmetic_of_other_processors(name, instructions, bits, pool, monkeypatch):
    """What this machine may lack is emulated: everything around those instructions is the code that others run."""
    monkeypatch.setattr(isa, "call", emulated)
    w, truth = packed(name, 19, 512)
    weights = IntegerWeights(pool, bits)
    x = np.random.default_rng(1).standard_normal((18, 512)).astype(np.float32)
    results = []
    for kind in ("dot_panels", "tile_panels"):
        blocks, values = quantized(x, form_of(bits, instructions, kind, name))
        type_name = f"{name}/{instructions}{'' if bits == 8 else '/16'}/rows"
        function = build._MAKERS[kind](f"{type_name}:emulated")
        compiled = njit(nogil=True)(function)
        compiled.compile(types.void(*build._ARGUMENTS[kind]))
        prepared = prepare(w)
        for n_tokens in (18, 16, 5, 1):  # whole tiles, and parts of them
            out = np.full((n_tokens, 19), np.nan, np.float32)
            operands = np.array(weights.operands(blocks[:n_tokens], prepared, out), dtype=np.int64)
            compiled(array_address(operands), 0, n_items(kind, prepared), 0)
            results.append(out)
    for result in results:
        np.testing.assert_array_equal(result, results[0][: len(result)])
    assert (np.abs(results[0] - values @ truth.T) <= 3e-6 * np.abs(values) @ np.abs(truth).T).all()


@pytest.mark.skipif(not hasattr(signal, "setitimer") or not hasattr(os, "fork"), reason="neither signals nor fork here")
def test_signals_and_children_change_nothing():
    """Registers that the system saves apart, like AMX's, are those of each thread, also after a fork."""
    code = """
import os, signal, threading, time, warnings
import numpy as np
warnings.simplefilter("ignore")
from engine.cpu.products.integer import IntegerWeights
from engine.cpu.steps.immediate import Immediate
from engine.cpu.threads import ThreadPool
from engine.model.weights import Linear
from tests.support.integer_products import packed
linears = [Linear(packed(name, 64, 512)[0]) for name in ("Q4_0", "Q6_K")]  # tiles of other sizes
x = np.random.default_rng(5).standard_normal((64, 512), dtype=np.float32)
pool = ThreadPool(2)
weights = IntegerWeights(pool, 8)
expected = [Immediate(pool, weights).linear("y", x, linear) for linear in linears]
signals, wrong = [], []
def check(pool, seconds=1):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for linear, y in zip(linears, expected):
            if not np.array_equal(Immediate(pool, weights).linear("y", x, linear), y):
                wrong.append(linear)
def of_another_thread():
    with ThreadPool(1) as own:
        check(own)
signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
other = threading.Thread(target=of_another_thread)
other.start()
check(pool)
other.join()
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(signals) > 50
child = os.fork()
check(pool, 0.1)
assert not wrong
pool.close()
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_instruction_set_can_be_forced(monkeypatch):
    integer.instructions.cache_clear()
    try:
        for name in HOST:
            monkeypatch.setenv(integer.VARIABLE, name)
            assert integer.instructions() == name
            integer.instructions.cache_clear()
        monkeypatch.setenv(integer.VARIABLE, "abacus")
        with pytest.raises(InvalidRequestError, match=r"'abacus'; possible on this machine: .*portable"):
            integer.instructions()
    finally:
        integer.instructions.cache_clear()


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512vl,+avx512vnni", "vnni512"),
        ("x86_64-unknown-linux-gnu", "+avx2,+avxvnni,-avx512f", "vnni"),
        ("x86_64-unknown-linux-gnu", "+avx2,-avxvnni,+avx512vnni,-avx512vl", "avx2"),
        ("x86_64-unknown-linux-gnu", "+sse4.2,-avx2", "portable"),
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512vl,+avx512vnni,+amx-int8", "amx"),
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512vl,+avx512vnni,+amx-int8,-amx-tile", "vnni512"),
        ("aarch64-unknown-linux-gnu", "+neon,+dotprod", "neon"),
        ("aarch64-unknown-linux-gnu", "+neon,+dotprod,+i8mm", "i8mm"),
        ("aarch64-unknown-linux-gnu", "+neon,+i8mm", "portable"),
        ("arm64-apple-darwin", "+neon,+dotprod", "neon"),
        ("aarch64-unknown-linux-gnu", "+neon", "portable"),
        ("riscv64-unknown-linux-gnu", "+v", "portable"),
    ],
)
def test_choice_of_instructions(triple, features, expected):
    assert processor.best(triple, features) == expected


@dataclass(frozen=True)
class Target:
    """A processor to compile for, and the instruction that must come out.

    In tiles others come out: with activations of 8 bits, and of 16.
    """

    isa: str
    triple: str
    features: str
    wanted: str
    tiles: str = ""
    tiles_16: str = ""

    def instruction(self, kind, bits):
        """What a kernel must have."""
        return {"tile_panels8": self.tiles, "tile_panels16": self.tiles_16}.get(f"{kind}{bits}") or self.wanted


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX2 = "+avx2,+fma,+f16c"
VNNI = f"{AVX2},+avx512f,+avx512vl,+avx512vnni"

TARGETS = (
    Target("vnni", X86, f"{AVX2},+avxvnni", "vpdpbusd", tiles_16="vpdpwssd"),
    Target("vnni", X86, VNNI, "vpdpbusd", tiles_16="vpdpwssd"),
    Target("vnni512", X86, VNNI, "vpdpbusd", tiles_16="vpdpwssd"),
    Target("amx", X86, f"{VNNI},+amx-tile,+amx-int8", "vpdpbusd", "tdpbssd", "vpdpwssd"),
    Target("avx2", X86, AVX2, "vpmadd"),
    Target("neon", ARM, "+neon,+dotprod,+fullfp16", "sdot"),
    Target("i8mm", ARM, "+neon,+dotprod,+fullfp16,+i8mm", "sdot", tiles="smmla"),
    Target("portable", ARM, "+neon", "fmla"),
)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.isa}-{target.features.rpartition('+')[2]}")
@pytest.mark.parametrize("kind", ["dot_panels", "tile_panels"])
def test_instructions_of_other_processors(kind, target):
    """Kernels compile for processors that this machine is not, to the instruction meant, and call no other code."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(features=target.features, opt=2)
    emitted = []
    for name in ("Q4_K", "Q8_0", "IQ4_XS", "IQ2_XXS", "Q6_K 16", "IQ3_S 16"):
        format, *bits = name.split()
        source = llvm_of(kind, "/".join((format, target.isa, *bits)))
        source = re.sub(r'target (triple|datalayout) = .*|"target-(cpu|features)"="[^"]*"', "", source)
        module = llvm.parse_assembly(source)
        module.triple, module.data_layout = target.triple, str(machine.target_data)
        emitted.append(machine.emit_assembly(module))
    for assembly, bits in zip(emitted, (8, 8, 8, 8, 16, 16), strict=True):
        assert target.instruction(kind, bits) in assembly
        called = set(re.findall(r"^\s(?:callq?|bl)\s+(\S+)", assembly, re.MULTILINE))
        assert not any(name.startswith("__") for name in called), called


def test_kinds_of_products():
    assert [dot_kind(n) for n in (1, 2, 64)] == ["dot_panels", "tile_panels", "tile_panels"]
