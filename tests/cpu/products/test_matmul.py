import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.cpu.bandwidth import read_bandwidth
from engine.cpu.kernels import blocked, build, emit, products, stepping, terms
from engine.cpu.kernels.formats import decoders
from engine.cpu.products import matmul as matmul_module
from engine.cpu.products.matmul import Epilogue, matmul, warm_up
from engine.cpu.threads import ThreadPool
from engine.gguf.quants import GGMLType
from tests.support.weights import SCALES, Weight

ROWS = (1, 2, 7, 16, 17, 31, 33, 256)
TOKENS = (1, 2, 7, 33)
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": None} | dict.fromkeys(("F64", "I8", "I16", "I32", "I64"))
BLOCKS = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
)
TYPES = ("F32", "F16", "BF16", *BLOCKS)  # the others: test_formats.py


@pytest.fixture(scope="module")
def pools():
    with ThreadPool(1) as one, ThreadPool(2) as two:
        yield one, two


@lru_cache(maxsize=4)
def packed(name, rows, columns):
    """Random rows of a type: (uint8 (rows, row bytes), read-only; their float64 values by the gguf package)."""
    rng = np.random.default_rng(rows * 1000 + columns)
    if name in PLAIN:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        if name == "BF16":
            raw = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            raw = values.astype(PLAIN[name]).view(np.uint8)
    else:
        decoder = decoders.DECODERS[name]
        raw = rng.integers(0, 256, (rows * columns // decoder.block_size, decoder.type_size), dtype=np.uint8)
        for offset in SCALES[name]:
            scales = rng.standard_normal(len(raw)).astype(np.float16)
            raw[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
        if name == "MXFP4":
            raw[:, 0] = rng.integers(110, 130, len(raw))
        raw = raw.reshape(rows, -1)
    raw.flags.writeable = False
    truth = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(rows, columns).astype(np.float64)
    return raw, truth


def activations(tokens, columns):
    return np.random.default_rng(tokens + columns).standard_normal((tokens, columns), dtype=np.float32)


def assert_close(got, truth, x):
    """Every step of a float32 sum in 16 lanes adds at most half a unit of the sum of magnitudes."""
    columns = x.shape[1]
    bound = (columns / 16 + 8) * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(truth).T)
    error = np.abs(got - x.astype(np.float64) @ truth.T)
    assert got.dtype == np.float32
    assert (error <= bound + 1e-30).all(), f"error up to {np.max(error - bound)} above the bound"


def columns_of(name):
    if name in PLAIN:
        return (1, 7, 16, 33, 64, 528)
    block = decoders.DECODERS[name].block_size
    return (block, 2 * block, 3 * block)


@pytest.mark.parametrize("name", TYPES)
def test_products_at_edge_shapes(name, pools):
    for columns in columns_of(name):
        raw, truth = packed(name, max(ROWS), columns)
        for rows in ROWS:
            w = Weight(GGMLType[name], (rows, columns), raw[:rows])
            for tokens in TOKENS:
                x = activations(tokens, columns)
                got = matmul(x, w, pool=pools[1])
                assert_close(got, truth[:rows], x)
                assert np.array_equal(got, matmul(x, w, pool=pools[0]))


@pytest.mark.parametrize("name", TYPES)
def test_a_row_does_not_depend_on_other_rows_or_on_threads(name, pools, monkeypatch):
    # Small tasks, so that the work is spread although the matrix is small.
    monkeypatch.setattr(matmul_module, "DOT_TASK_WEIGHTS", 1 << 10)
    # Three chunks of columns, the last one shorter.
    raw, _ = packed(name, 97, 1792)
    w = Weight(GGMLType[name], (97, 1792), raw)
    x = activations(70, 1792)
    whole = matmul(x, w, pool=pools[0])
    for tokens in (1, 2, 3, 4, 5, 32, 33, 64, 70):
        for pool in pools:
            assert np.array_equal(whole[-tokens:], matmul(x[-tokens:], w, pool=pool))


def test_activations_rounded_to_pairs(pools, monkeypatch):
    """Pairs of BF16 against float64, with the same bits for any number of rows; other products are not rounded."""
    monkeypatch.setattr(terms, "has_pairs", terms.multiplies_pairs)  # also where they are slow
    for columns in (32, 96, 4640):
        raw, truth = packed("BF16", 97, columns)
        w = Weight(GGMLType.BF16, (97, columns), raw)
        x = activations(70, columns)
        if not terms.multiplies_pairs():
            assert np.array_equal(matmul(x, w, pool=pools[0], rounded=True), matmul(x, w, pool=pools[0]))
            continue
        bits = x.view(np.uint32)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
        whole = matmul(x, w, pool=pools[1], rounded=True)
        assert_close(whole, truth, nearest)
        for tokens in (1, 2, 5, 9, 64):
            for pool in pools:
                assert np.array_equal(whole[-tokens:], matmul(x[-tokens:], w, pool=pool, rounded=True))
    for name, columns in (("BF16", 48), ("F16", 64), ("Q8_0", 64)):
        w, x = Weight(GGMLType[name], (7, columns), packed(name, 7, columns)[0]), activations(9, columns)
        assert np.array_equal(matmul(x, w, pool=pools[0], rounded=True), matmul(x, w, pool=pools[0]))


def test_scale_bias_and_residual(pools):
    raw, _ = packed("F16", 97, 528)
    w = Weight(GGMLType.F16, (97, 528), raw)
    rng = np.random.default_rng(3)
    bias, residual = rng.standard_normal(97, dtype=np.float32), rng.standard_normal((50, 97), dtype=np.float32)
    for tokens in (1, 5, 50):
        x = activations(tokens, 528)
        expected = np.float32(0.3) * matmul(x, w, pool=pools[0]) + bias + residual[:tokens]
        got = matmul(x, w, pool=pools[1], epilogue=Epilogue(0.3, bias, residual[:tokens]))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["Q4_K", "F16", "Q8_0"])
def test_reference_path(name, pools, monkeypatch):
    monkeypatch.setattr(matmul_module, "REFERENCE_TILE", 10 * 512)
    raw, truth = packed(name, 33, 512)
    w = Weight(GGMLType[name], (33, 512), raw)
    for tokens in (0, 1, 7):
        x = activations(tokens, 512)
        assert_close(matmul(x, w, pool=pools[1], reference=True), truth, x)


def test_no_tokens(pools):
    raw, _ = packed("Q4_0", 7, 64)
    got = matmul(np.zeros((0, 64), np.float32), Weight(GGMLType.Q4_0, (7, 64), raw), pool=pools[0])
    assert got.shape == (0, 7)
    assert got.dtype == np.float32


def test_views_and_other_input_types(pools):
    raw, truth = packed("Q5_K", 31, 512)
    w = Weight(GGMLType.Q5_K, (31, 512), raw)
    x = activations(7, 512)
    want = matmul(x, w, pool=pools[0])
    frozen = x.copy()
    frozen.flags.writeable = False
    for same in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], frozen, x.astype(np.float64)):
        assert np.array_equal(want, matmul(same, w, pool=pools[0]))
        assert np.array_equal(want[:1], matmul(same[:1], w, pool=pools[0]))
    every_second = Weight(GGMLType.Q5_K, (16, 512), raw[::2])
    assert np.array_equal(want[:, ::2], matmul(x, every_second, pool=pools[0]))
    strided = np.asfortranarray(raw)
    assert np.array_equal(want, matmul(x, Weight(GGMLType.Q5_K, (31, 512), strided), pool=pools[0]))
    backwards = Weight(GGMLType.Q5_K, (31, 512), raw[::-1])
    assert np.array_equal(want[:, ::-1], matmul(x, backwards, pool=pools[0]))
    assert_close(want, truth, x)


def test_wide_matrices(pools):
    """More columns than one pass, more rows than one tile."""
    raw, truth = packed("Q6_K", 130, 1280)
    x = activations(35, 1280)
    assert_close(matmul(x, Weight(GGMLType.Q6_K, (130, 1280), raw), pool=pools[1]), truth, x)


@pytest.mark.parametrize("tokens", [1, 5])
def test_types_without_a_decoder_use_numpy(pools, monkeypatch, tokens):
    raw, _ = packed("Q4_0", 50, 64)
    x = activations(tokens, 64)
    compiled = matmul(x, Weight(GGMLType.Q4_0, (50, 64), raw), pool=pools[1])
    monkeypatch.delitem(decoders.DECODERS, "Q4_0")
    assert np.array_equal(compiled, matmul(x, Weight(GGMLType.Q4_0, (50, 64), raw), pool=pools[1]))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "raw_shape", "message"),
    [
        ((1, 32), (4, 64), (4, 36), r"x is \(1, 32\), must be \(tokens, 64\)"),
        ((64,), (4, 64), (4, 36), r"must be \(tokens, 64\)"),
        ((1, 64), (4, 64), (4, 35), r"must be uint8 \(4, 36\)"),
        ((1, 64), (4, 64), (3, 36), r"must be uint8 \(4, 36\)"),
        ((1, 64), (2, 4, 64), (2, 4, 36), "not a matrix"),
    ],
)
def test_wrong_shapes_are_refused(pools, x_shape, w_shape, raw_shape, message):
    w = Weight(GGMLType.Q4_0, w_shape, np.zeros(raw_shape, np.uint8))
    with pytest.raises(ValueError, match=message):
        matmul(np.zeros(x_shape, np.float32), w, pool=pools[0])


def test_decoders_have_the_sizes_of_the_formats():
    assert emit.LANES == matmul_module.LANES
    for rows, tokens in (blocked.TILE, blocked.WIDE_TILE):  # partial sums of a block lie where whole tiles end
        assert matmul_module.ROWS_STEP % rows == blocked.ROWS_BLOCK % rows == blocked.TOKENS_BLOCK % tokens == 0
    for name, decoder in decoders.DECODERS.items():
        size = 16 if name in PLAIN else 1
        block = GGMLType[name]
        assert (decoder.block_size, decoder.type_size) == (size * block.block_size, size * block.type_size)


@pytest.mark.parametrize("native", [True, False])
def test_every_float16(native, monkeypatch):
    """Hardware conversion and the integer fallback against numpy, subnormals, infinities and NaN included."""
    from numba import njit, types

    if not native:
        monkeypatch.setattr(stepping, "has_native_half", lambda _: False)
    convert = njit(nogil=True)(build._MAKERS["dequantize_rows"]("F16"))
    convert.compile(types.void(*products.ARGUMENTS["dequantize_rows"]))
    half = np.arange(1 << 16, dtype=np.uint16)
    got = np.empty(1 << 16, np.float32)
    convert(half.ctypes.data, half.nbytes, half.size // 16, got.ctypes.data, got.nbytes, 1)
    want = half.view(np.float16).astype(np.float32)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


def test_warm_up_tells_what_it_compiles():
    told = []
    warm_up([GGMLType.Q4_K, GGMLType.F32, GGMLType.Q4_K], told.append)
    assert told == ["preparing kernels: Q4_K", "preparing kernels: F32", "preparing kernels: product"]


def test_read_bandwidth(pools):
    measured = read_bandwidth(pools[1], n_bytes=8 << 20, repeats=3)
    assert 1e8 < measured.median <= measured.best < 1e13
    assert measured.threads == 2


SCRIPT = """
import numpy as np
from engine.cpu.kernels.build import kernel
x, out = np.ones((1, 16), np.float32), np.zeros((1, 1), np.float32)
at, to, one = x.ctypes.data, out.ctypes.data, int(np.float64(1.0).view(np.int64))
operands = np.array([at, 64, 1, at, 64, 1, to, 4, one, 0, 0, 0])
kernel("dot_rows", "F32")(operands.ctypes.data, 0, 1, 0)
print(out[0, 0])
"""


def test_disk_cache_wherever_it_may_be_written(tmp_path):
    """A package folder that cannot hold a cache, two processes at once, a damaged cache, no writable folder at all."""
    package = tmp_path / "site" / "engine"
    source = Path(build.__file__).parents[2]
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "*.gguf", "cuda"))
    # A file in the place of the folder refuses writers even where the tests run as root.
    (package / "cpu" / "kernels" / "__pycache__").touch()

    def start(cache):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA")}
        environment |= {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT], env=environment, cwd=tmp_path, stdout=subprocess.PIPE
        )

    def finish(process):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output.strip() == b"16.0"

    cache = tmp_path / "cache"
    for process in [start(cache), start(cache)]:
        finish(process)
    entries = list(cache.rglob("*.nbc"))
    assert len(entries) == 1
    for entry in [*entries, *cache.rglob("*.nbi")]:
        entry.write_bytes(entry.read_bytes()[:100])
    finish(start(cache))
    (tmp_path / "file").touch()
    finish(start(tmp_path / "file"))
