"""A token with numbers that are not finite spoils the rows that see it, and no others, in every attention kernel.

Decode kernels and the general kernel of prompts compiled for the CPU; all kernels on a GPU.
"""

import ctypes
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine.config import PAGE, KvType
from engine.cuda.attention.attention_plan import decode_plan, jobs_of_plans, prefill_plan
from engine.cuda.attention.attention_shape import LayerAttention
from engine.cuda.driver.compiler import kernel_files
from tests.support.gpu.attention_on_host import PLAIN, host_plan, host_source
from tests.support.gpu.attention_reference import attend64, empty_pages, numbers, shape_of
from tests.support.gpu.helpers import decode_logits, opened
from tests.support.gpu.host_kernels import address, host_library
from tests.support.models.feature_models import CASES, latent

LATENT = {"dim": 40, "value_dim": 32, "rope_dim": 0, "kv_heads": 1, "values_in_keys": True}
SHAPES = {
    "f16": shape_of(2, 2, 32),
    "f32": shape_of(2, 2, 32, half=False),
    "q8_0": shape_of(2, 2, 64, half=KvType.Q8_0),
    "q8_0, other tails": shape_of(4, 2, 96, value_dim=160, half=KvType.Q8_0),
    "biases": shape_of(2, 2, 32, rope_dim=0, alibi=True),
    "latent f16": shape_of(2, **LATENT),
    "latent f32": shape_of(2, half=False, **LATENT),
    "two blocks a cache head": shape_of(10, 1, 32),
}
WIDE = {
    "wide f16": shape_of(8, 2, 128),
    "wide f32": shape_of(8, 2, 128, half=False),
    "wide q8_0": shape_of(8, 2, 128, half=KvType.Q8_0),
    "wide latent": shape_of(16, 1, 576, value_dim=512, rope_dim=0, values_in_keys=True),
}
HOST_ROWS, HOST_AT, HOST_WINDOW = 40, 36, 3
DECODED = range(139, 146)
HOST_DECODE_AT = 141
"""Positions that are decoded on the host, behind a prompt, and the spoilt one; the cached ones are several ranges."""
ROWS, AT, WINDOW = 150, 70, 20
"""Rows of a prompt, and the spoilt one: before it are rows of its tile and, on the GPU, a whole page; behind the window
are rows that do not see it."""

ENTRY = """
extern "C" void rope_append_{i}(int rows, int blocks, float* qkv, u8* k, u8* v, const int* table, int max_pages,
                                const int* sequence, const int* positions, const double* inv_freq) {{
    using namespace of_rope_append_{i};
    launch_blocks(rows, blocks, 128, [&] {{
        rope_append(qkv, nullptr, (cache_t*)k, (cache_t*)v, table, max_pages, sequence, positions, inv_freq, 1.0f, 0.0f,
                    1, 0, nullptr, nullptr, 0.0f, 0);
    }});
}}
extern "C" void prefill_{i}(int tiles, int heads, const float* qkv, const u8* k, const u8* v, const int* table,
                            int max_pages, const int4* tile, float scale, int window, const float* sinks, float* out,
                            const float* slopes) {{
    using namespace of_prefill_{i};
    launch_blocks(tiles, heads, 256, [&] {{
        attention_prefill(qkv, (cache_t*)k, (cache_t*)v, table, max_pages, tile, scale, 0.0f, window, sinks,
                          out, 0{slopes});
    }});
}}
"""
DECODE_ENTRY = """
extern "C" void {name}_{i}(int x, int y, int z, int threads, const float* qkv, u8* k, u8* v, const int* table,
                           int max_pages, const int* positions, const double* inv_freq, float scale, int window,
                           const float* sinks, int slots, float* partial, float2* partial_max_sum, int* counters,
                           float* out, const float* slopes) {{
    using namespace of_{name}_{i};
    launch_blocks(Dimensions{{x, y, z}}, threads, [&] {{
        attention_decode(qkv, (cache_t*)k, (cache_t*)v, table, max_pages, positions, 1, inv_freq, 1.0f, 0.0f, 1, 0,
                         nullptr, nullptr, 0.0f, scale, 0.0f, window, sinks, slots, partial, partial_max_sum, counters,
                         out, nullptr, 0{slopes});
    }});
}}
"""


def spoil(rows, at, shape, kind):
    """Spoils a row of qkv: all of it, or one number of its value."""
    q_end = shape.heads * shape.key_dim
    k_end = q_end + shape.kv_heads * shape.key_dim
    if kind == "row":
        rows[at] = np.nan
    elif shape.values_in_keys:
        rows[at, q_end + 3] = rows[at, k_end + 3] = {"infinite": np.inf, "too large": 1e9}[kind]
    else:
        rows[at, k_end + 3] = {"infinite": np.inf, "too large": 1e9}[kind]
    return rows


def kinds_of(shape):
    """1e9 is infinity in a float16 cache, and more than the scale of bytes can be."""
    return ("row", "infinite") if shape.kv_type is KvType.F32 else ("row", "infinite", "too large")


def spoilt_heads(shape, kind):
    """Query heads whose results are spoilt where a row sees the position."""
    return slice(None) if kind == "row" else slice(0, shape.heads // shape.kv_heads)


def clean_rows(shape, n):
    """Random qkv (n, row width); values are the keys' first numbers where the shape says so."""
    rows = np.random.default_rng(1).normal(size=(n, shape.row_width)).astype(np.float32)
    if shape.values_in_keys:
        at = (shape.heads + 1) * shape.key_dim
        rows[:, at:] = rows[:, at - shape.key_dim :][:, : shape.value_dim]
    return rows


def constants(shape):
    """Frequencies, sinks and slopes."""
    frequencies = 10000.0 ** (-np.arange(max(1, shape.rope_dim // 2)) / 16)
    return frequencies, *(np.linspace(*ends, shape.heads, dtype=np.float32) for ends in ((-1, 1), (0.01, 0.5)))


def check_rows(shape, found, clean, at, window, kind):
    """Rows before the spoilt one and rows whose window has left it behind have the bits of a clean prompt."""
    found, clean = (rows.reshape(len(rows), shape.heads, shape.value_dim) for rows in (found, clean))
    assert np.isfinite(clean).all()
    end = at + window if window else len(found)
    assert found[:at].tobytes() == clean[:at].tobytes()
    assert found[end:].tobytes() == clean[end:].tobytes()
    assert np.isnan(found[at:end, spoilt_heads(shape, kind)]).all()


# ---- on the CPU ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """rope_append, the general kernel of prompts and the decode kernels for every shape, as one shared library."""
    text = {name: path.read_text(encoding="utf-8") for name, path in kernel_files().items()}
    source = '#include "blocks_on_host.h"\n'
    for i, shape in enumerate(SHAPES.values()):
        plan = host_plan(shape)
        jobs = jobs_of_plans(shape, plan, PLAIN)
        for name, (files, defines) in zip(("decode_runs", "decode_one", "rope_append", "prefill"), jobs, strict=True):
            source += host_source(f"{name}_{i}", files, defines | {"SHARED_BYTES": plan.shared_bytes}, text)
        slopes = ", slopes" if shape.alibi else ""
        source += ENTRY.format(i=i, slopes=slopes)
        source += "".join(DECODE_ENTRY.format(i=i, name=name, slopes=slopes) for name in ("decode_runs", "decode_one"))
    return host_library(tmp_path_factory.mktemp("host"), source)


def on_host(library, name, rows, window, *, decoded=range(0), kernel="decode_one"):
    """(results, keys, values) of a prompt whose last positions may be decoded instead, then with their results alone.

    Keys and values are (pages, kv_heads, PAGE, width), as numbers. The last page is not the sequence's; all of them are
    garbage before.
    """
    shape, i, n = SHAPES[name], list(SHAPES).index(name), len(rows) - len(decoded)
    pages = -(-len(rows) // PAGE) + 1
    keys = empty_pages(shape, pages, shape.key_dim)
    values = keys if shape.values_in_keys else empty_pages(shape, pages, shape.value_dim)
    page_of = [*range(pages - 1), -1]
    table, positions, sequence = (np.array(one, np.int32) for one in ([page_of], range(len(rows)), [0] * n))
    tiles = np.array([[row, min(PLAIN.rows, n - row), 0, row] for row in range(0, n, PLAIN.rows)], np.int32)
    frequencies, sinks, slopes = constants(shape)
    out = np.empty((len(rows), shape.heads * shape.value_dim), np.float32)

    def run(kernel, *args):
        given = [address(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        getattr(library, f"{kernel}_{i}")(*given)

    run("rope_append", n, 2, rows, keys, values, table, pages, sequence, positions, frequencies)
    scale = ctypes.c_float(0.2)
    if not decoded:
        tiled = (rows, keys, values, table, pages, tiles, scale, window, sinks, out, slopes)
        run("prefill", len(tiles), shape.heads, *tiled)
        return out, *held(shape, keys, values)
    plan, columns = host_plan(shape), shape.kv_heads * shape.head_tiles
    of_heads = columns * plan.parts(shape)
    grid = (of_heads, plan.n_splits, 1) if kernel == "decode_one" else (columns, plan.blocks, 1)
    partial = np.full((columns * plan.n_splits * shape.active_heads, shape.value_dim + 2), np.nan, np.float32)
    sums, tops = partial[:, 2:].copy(), partial[:, :2].copy()
    counters = np.zeros(of_heads, np.int32)
    for row in decoded:
        one, constant = rows[row : row + 1], (frequencies, scale, window, sinks, plan.n_splits)
        cached = (keys, values, table, pages, positions[row : row + 1])
        scratch = (sums, tops, counters)
        run(kernel, *grid, plan.warps * 32, one, *cached, *constant, *scratch, out[row : row + 1], slopes)
        assert not counters.any()
    return out[decoded], *held(shape, keys, values)


def held(shape, keys, values):
    """Pages as numbers."""
    held_keys = numbers(shape, keys, shape.key_dim)
    return held_keys, held_keys if shape.values_in_keys else numbers(shape, values, shape.value_dim)


def check_cache(shape, keys, values, clean_keys, at, n):
    """Values are finite; of the keys one number of one position is marked (n positions, the spoilt one at `at`)."""
    rows = np.arange(n)
    page, row = rows // PAGE, rows % PAGE
    assert np.isfinite(values[page, :, row][..., : shape.value_dim]).all()
    assert np.isnan(keys[at // PAGE, 0, at % PAGE, -1])
    page, row = page[rows != at], row[rows != at]
    assert keys[page, :, row].tobytes() == clean_keys[page, :, row].tobytes()


@pytest.mark.parametrize(("name", "window"), [*((name, 0) for name in SHAPES), ("f16", HOST_WINDOW)])
def test_prompts_on_the_host(library, name, window):
    shape = SHAPES[name]
    clean = clean_rows(shape, HOST_ROWS)
    expected, clean_keys, _ = on_host(library, name, clean.copy(), window)
    for kind in kinds_of(shape):
        found, keys, values = on_host(library, name, spoil(clean.copy(), HOST_AT, shape, kind), window)
        check_rows(shape, found, expected, HOST_AT, window, kind)
        check_cache(shape, keys, values, clean_keys, HOST_AT, HOST_ROWS)


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name].bytes_cached])
def test_a_cache_of_bytes_is_read_as_it_is_held(library, name):
    """Decoded tokens against float64 over the numbers that the cache holds, rounding of weights and values aside."""
    shape, rows = SHAPES[name], clean_rows(SHAPES[name], DECODED.stop)
    turned = rows.copy()
    _, *pages = on_host(library, name, turned, 0)
    one, runs = (
        on_host(library, name, rows.copy(), 0, decoded=DECODED, kernel=f"decode_{how}") for how in ("one", "runs")
    )
    assert one[0].tobytes() == runs[0].tobytes()
    assert one[1].tobytes() == pages[0].tobytes(), "a token is cached as a prompt's is"
    constant = LayerAttention(0.2, sinks=constants(shape)[1])
    whole = [each.transpose(0, 2, 1, 3).reshape(-1, *each.shape[1:2], each.shape[3]).astype(float) for each in pages]
    for row, result in zip(DECODED, one[0], strict=True):
        q = turned[row, : shape.heads * shape.key_dim].reshape(shape.heads, -1).astype(float)
        want = attend64(shape, constant, q, *(each[: row + 1] for each in whole), row)
        assert np.linalg.norm(result - want) < 3e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("kernel", ["decode_one", "decode_runs"])
@pytest.mark.parametrize(
    ("name", "window"), [*((name, 0) for name in SHAPES), *((x, HOST_WINDOW) for x in ("f16", "f32"))]
)
def test_decoded_tokens_on_the_host(library, name, window, kernel):
    shape = SHAPES[name]
    clean = clean_rows(shape, DECODED.stop)
    options = {"decoded": DECODED, "kernel": kernel}
    expected, clean_keys, _ = on_host(library, name, clean.copy(), window, **options)
    for kind in kinds_of(shape):
        spoilt = spoil(clean.copy(), HOST_DECODE_AT, shape, kind)
        found, keys, values = on_host(library, name, spoilt, window, **options)
        check_rows(shape, found, expected, HOST_DECODE_AT - DECODED.start, window, kind)
        check_cache(shape, keys, values, clean_keys, HOST_DECODE_AT, DECODED.stop)


# ---- on a GPU ------------------------------------------------------------------------------------------------

ON_GPU = SHAPES | WIDE


def on_gpu(shape, rows, window, *, plan=None, decoded=False, few_rows=4):
    """Results of the rows of one sequence: as a prompt, or token by token; the cache's pages are NaN before."""
    import cupy

    from engine.cuda.attention.attention import Attention, LayerAttention, prefill_tiles
    from engine.cuda.driver.compiler import device_arch

    n = len(rows)
    decode = replace(decode_plan(shape, device_arch(), 132), min_chunk=PAGE, few_rows=few_rows)
    kernels = Attention(shape, 1, plan=decode, prefill=plan)
    keys = cupy.asarray(empty_pages(shape, 4, shape.key_dim))
    values = keys if shape.values_in_keys else cupy.asarray(empty_pages(shape, 4, shape.value_dim))
    frequencies, sinks, slopes = map(cupy.asarray, constants(shape))
    layer = LayerAttention(
        shape.key_dim**-0.5, frequencies, window=window, sinks=sinks, slopes=slopes if shape.alibi else None
    )
    device, table = cupy.asarray(rows), cupy.asarray(np.array([[2, 0, 3]], np.int32))
    positions, out = cupy.arange(n, dtype=np.int32), cupy.zeros((n, shape.heads * shape.value_dim), np.float32)
    if decoded:
        for row in range(n):
            one = slice(row, row + 1)
            # The launch before this one is the same layer's, and writes what an early start would read.
            kernels.decode(layer, device[one], keys, values, table, positions[one], out[one], early=False)
    else:
        kernels.rope_append(layer, device, keys, values, table, cupy.zeros(n, np.int32), positions)
        tiles = cupy.asarray(prefill_tiles([(0, n, 0, 0)], kernels.tile_rows))
        kernels.prefill(layer, device, keys, values, table, tiles, out)
    return out.get()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("kernel", ["prompt", "general prompt", "decode, one range a block", "decode, runs of ranges"])
@pytest.mark.parametrize("name", ON_GPU)
def test_every_kernel_on_a_gpu(name, kernel, window):
    from engine.cuda.driver.compiler import device_arch

    shape, options = ON_GPU[name], {"decoded": kernel.startswith("decode"), "few_rows": 4 if "one" in kernel else 0}
    if kernel == "general prompt":
        options["plan"] = prefill_plan(shape, device_arch(), hopper=False)
    clean = clean_rows(shape, ROWS)
    expected = on_gpu(shape, clean, window, **options)
    for kind in kinds_of(shape):
        found = on_gpu(shape, spoil(clean.copy(), AT, shape, kind), window, **options)
        check_rows(shape, found, expected, AT, window, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("case", [*CASES, partial(latent, True), partial(latent, False)])
def test_models_on_a_gpu(tmp_path, case, kv_type):
    """A prompt with a token that has no embedding, then another sequence in the same slot and pages."""
    file, _ = case()
    file.tensors["token_embd.weight"][1] = np.nan
    clean = np.random.default_rng(0).integers(2, 40, 30).tolist()
    spoilt = [*clean[:20], 1, *clean[21:]]
    with opened(file.write(tmp_path), context_length=32, kv_type=kv_type, max_sequences=2) as runner:
        expected, found = runner.logits(clean), runner.logits(spoilt)
        assert np.isfinite(expected).all()
        assert found[:20].tobytes() == expected[:20].tobytes()
        assert np.isnan(found[20]).all()
        assert runner.logits(clean).tobytes() == expected.tobytes()
        expected = decode_logits(runner, clean)
        assert decode_logits(runner, spoilt)[:20].tobytes() == expected[:20].tobytes()
        assert decode_logits(runner, clean).tobytes() == expected.tobytes()
