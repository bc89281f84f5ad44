from dataclasses import replace

import numpy as np
import pytest
from numba import njit, types

from engine.config import KV_BLOCK, PAGE
from engine.cpu.caches.attention import QuantizedPages
from engine.cpu.caches.rows import CacheRows
from engine.cpu.kernels import build
from engine.cpu.kernels.attention import attend as attend_module
from engine.cpu.kernels.attention import loop
from engine.cpu.kernels.attention.attend import attend, can_attend, turned
from engine.cpu.reference import attend as attend_plainly
from engine.cpu.threads import ThreadPool
from engine.model.config import AttentionConfig
from engine.model.kv_format import dequantize, quantize


@pytest.fixture(scope="module")
def pools():
    with ThreadPool(1) as one, ThreadPool(2) as two:
        yield one, two


def truth(q, keys, values, scale, window, n_past, softcap=None, sinks=None, slopes=None):
    """Attention in float64, one query and head at a time."""
    n_tokens, n_heads, _ = q.shape
    group = n_heads // keys.shape[0]
    out = np.empty((n_tokens, n_heads, values.shape[2]))
    for t in range(n_tokens):
        end = n_past + t + 1
        begin = 0 if window is None else max(0, end - window)
        for h in range(n_heads):
            k, v = (a[h // group, begin:end].astype(np.float64) for a in (keys, values))
            scores = scale * (k @ q[t, h].astype(np.float64))
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if slopes is not None:
                scores += slopes[h] * (np.arange(begin, end) - (n_past + t))
            top = scores.max() if sinks is None else max(scores.max(), sinks[h])
            weights = np.exp(scores - top)
            out[t, h] = weights @ v / (weights.sum() + (0.0 if sinks is None else np.exp(sinks[h] - top)))
    return out.reshape(n_tokens, -1)


def operands(dtype, n_heads, n_kv, key_width, value_width, n_past, n_tokens):
    """Queries with scores of some size, keys and values (K, positions, width)."""
    rng = np.random.default_rng(n_past + n_tokens)
    if dtype is np.int8:  # rows are what 8 bits hold
        key_width, value_width = (-(-width // KV_BLOCK) * KV_BLOCK for width in (key_width, value_width))
    q = 3 * rng.standard_normal((n_tokens, n_heads, key_width), dtype=np.float32)
    keys = rng.standard_normal((n_kv, n_past + n_tokens, key_width))
    values = rng.standard_normal((n_kv, n_past + n_tokens, value_width))
    if dtype is np.int8:
        return q, *(dequantize(*quantize(array.astype(np.float32))) for array in (keys, values))
    return q, keys.astype(dtype), values.astype(dtype)


def paged(keys, values, n_tokens, seed=0, dtype=None):
    """Keys and values as the cache has them, pages (N, K, PAGE, width) in a random order, and the newest rows' places.

    Those are of one sequence that has as many positions as there are keys.
    """
    rng = np.random.default_rng(seed)
    n = -(-keys.shape[1] // PAGE)
    pages = rng.permutation(2 * n + 3)[:n].astype(np.int64)
    cut = []
    for array in (keys, values):
        whole = np.full((array.shape[0], n * PAGE, array.shape[2]), np.nan, array.dtype)
        whole[:, : array.shape[1]] = array
        target = np.full((2 * n + 3, array.shape[0], PAGE, array.shape[2]), np.nan, array.dtype)
        target[pages] = whole.reshape(array.shape[0], n, PAGE, -1).transpose(1, 0, 2, 3)
        cut.append(target)
    positions = np.arange(keys.shape[1] - n_tokens, keys.shape[1])
    rows = np.stack([np.full(n_tokens, pages.ctypes.data), positions], axis=1)
    where = CacheRows(rows, pages, n_tokens == 1)
    if dtype is np.int8:
        return *(in_8_bits(array, turned=index == 0) for index, array in enumerate(cut)), where
    return turned(np.ascontiguousarray(turned(cut[0]))), cut[1], where


def in_8_bits(pages, *, turned):
    """Pages (N, K, PAGE, width) of numbers that 8 bits hold; places without one have a scale that is none."""
    n, heads, _, width = pages.shape
    made = QuantizedPages.zeros(n, heads, width, turned=turned)
    for place in range(PAGE):
        made.store(np.arange(n), np.full(n, place), pages[:, :, place])
    return made.quants


@pytest.fixture(scope="module", params=[False, True], ids=["few", "many"])
def registers(request):
    """The kernel for AVX2's registers and for those of AVX-512, by its types, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "has_32_registers", lambda context: request.param)
        compiled = {}
        for name in ("F16", "F32", "Q8_0"):
            compiled[name] = njit(nogil=True)(build._MAKERS["attend"](f"{name}:registers"))
            compiled[name].compile(types.void(*build._ARGUMENTS["attend"]))
    return compiled


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "key_width", "value_width"),
    [(1, 1, 16, 16), (8, 2, 64, 64), (8, 1, 32, 80), (4, 4, 48, 112), (7, 1, 48, 32), (4, 2, 32, 64)],
)
@pytest.mark.parametrize(("n_past", "n_tokens"), [(0, 1), (0, 7), (15, 1), (16, 2), (31, 17), (255, 1), (300, 33)])
def test_against_float64(pools, registers, dtype, n_heads, n_kv, key_width, value_width, n_past, n_tokens, monkeypatch):
    monkeypatch.setattr(attend_module, "kernel", lambda kind, name: registers[name])
    q, keys, values = operands(dtype, n_heads, n_kv, key_width, value_width, n_past, n_tokens)
    scale = key_width**-0.5
    for window in (None, 1, 16, 1000):
        got = attend(q, *paged(keys, values, n_tokens, dtype=dtype), scale=scale, window=window, pool=pools[1])
        assert got.dtype == np.float32
        # Scores of about 10 carry float32 errors of 1e-6, which exp passes on.
        np.testing.assert_allclose(got, truth(q, keys, values, scale, window, n_past), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_a_query_does_not_depend_on_others_or_on_threads(pools, monkeypatch, dtype):
    monkeypatch.setattr(attend_module, "TASK_ELEMENTS", 256)
    q, keys, values = operands(dtype, 8, 2, 64, 64, 40, 33)
    settings = {"scale": 0.125, "window": None}
    *pages, rows = paged(keys, values, 33, dtype=dtype)
    whole = attend(q, *pages, rows, pool=pools[0], **settings)
    assert np.array_equal(whole, attend(q, *pages, rows, pool=pools[1], **settings))
    for pool in pools:  # as if each were of a sequence of its own, all heads of it together
        assert np.array_equal(whole, attend(q, *pages, replace(rows, alone=True), pool=pool, **settings))
    for t in range(33):
        past = 40 + t
        seen = paged(keys[:, : past + 1], values[:, : past + 1], 1, seed=t, dtype=dtype)  # in other pages
        one = attend(q[t : t + 1], *seen, pool=pools[1], **settings)
        assert np.array_equal(one, whole[t : t + 1])
        together = attend(q[t : t + 1], *seen, pool=pools[0], **settings)  # all heads by one thread
        assert np.array_equal(together, one)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("n_past", "n_tokens"), [(0, 7), (15, 1), (300, 33)])
@pytest.mark.parametrize("parts", [("softcap",), ("sinks",), ("slopes",), ("softcap", "sinks"), ("slopes", "sinks")])
def test_what_is_added_to_scores(pools, parts, n_past, n_tokens, window):
    q, keys, values = operands(np.float16, 8, 2, 32, 48, n_past, n_tokens)
    rng = np.random.default_rng(4)
    extra = {
        "softcap": 5.0,
        "sinks": rng.normal(0, 40, 8).astype(np.float32),  # above and below every score
        "slopes": np.exp2(-np.arange(1, 9)).astype(np.float32),
    }
    extra = {name: extra[name] for name in parts}
    got = attend(q, *paged(keys, values, n_tokens), scale=1.0, window=window, pool=pools[1], **extra)
    np.testing.assert_allclose(got, truth(q, keys, values, 1.0, window, n_past, **extra), rtol=5e-5, atol=2e-5)
    config = AttentionConfig(
        n_heads=8, n_kv_heads=2, key_width=32, value_width=48, scale=1.0, rope=None, window=window,
        softcap=extra.get("softcap"),
    )  # fmt: skip
    plain = attend_plainly(q, keys, values, config, n_past, sinks=extra.get("sinks"), alibi_slopes=extra.get("slopes"))
    np.testing.assert_allclose(plain, got, rtol=5e-5, atol=2e-5)


def test_large_scores_do_not_overflow(pools):
    q, keys, values = operands(np.float16, 2, 2, 16, 16, 50, 1)
    q *= 1000
    got = attend(q, *paged(keys, values, 1), scale=1.0, window=None, pool=pools[0])
    np.testing.assert_allclose(got, truth(q, keys, values, 1.0, None, 50), rtol=1e-3, atol=1e-3)


def test_read_only_and_strided_queries(pools):
    q, keys, values = operands(np.float16, 8, 2, 64, 64, 10, 3)
    cache = paged(keys, values, 3)
    want = attend(q, *cache, scale=1.0, window=None, pool=pools[0])
    for array in (q, *cache[:2], cache[2].array, cache[2].tables):
        array.flags.writeable = False
    assert np.array_equal(want, attend(np.asfortranarray(q), *cache, scale=1.0, window=None, pool=pools[0]))


def test_can_attend():
    values = np.zeros((3, 2, PAGE, 32), np.float16)
    keys = turned(np.zeros((3, 2, 32, PAGE), np.float16))
    assert can_attend(keys, values)
    assert can_attend(keys[:2], values[:2])
    assert not can_attend(values, values)
    assert not can_attend(keys, keys)
    assert not can_attend(keys[:, :1], values)
    assert not can_attend(keys, values.astype(np.float32))
    assert not can_attend(keys[..., :24], values)
    assert not can_attend(keys, values[..., ::2])
    assert not can_attend(keys.astype(np.float64), values.astype(np.float64))
