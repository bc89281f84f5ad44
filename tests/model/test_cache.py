"""The KV cache: where rows go, how memory follows use, and what a full or interrupted step leaves behind."""

import os

import numpy as np
import pytest

from engine.config import PAGE
from engine.cpu.caches.model import KVCache
from engine.errors import ContextFullError
from engine.model.batch import Batch, Outputs, Span
from engine.model.config import AttentionConfig
from engine.model.kv_format import dequantize, quantize


def layer(n_kv_heads=2, key_width=4, value_width=3):
    return AttentionConfig(
        n_heads=4, n_kv_heads=n_kv_heads, key_width=key_width, value_width=value_width, scale=0.5, rope=None
    )


def feed(cache, slot, n_past, n_rows, seed=0, pages=None):
    rng = np.random.default_rng(seed)
    span = Span(slot=slot, row=0, n_rows=n_rows, n_past=n_past, pages=pages)
    k, v = rng.normal(size=(n_rows, 2, 4)).astype(np.float32), rng.normal(size=(n_rows, 2, 3)).astype(np.float32)
    cache.reserve([span])
    for index in range(2):
        cache.append(index, span, k + index, v + index)
    return span, k, v


def assert_holds(cache, span, k, v):
    for index in range(2):
        keys, values = cache.view(index, span)
        np.testing.assert_array_equal(keys.transpose(1, 0, 2), k + index)
        np.testing.assert_array_equal(values.transpose(1, 0, 2), v + index)


def test_rows_come_back():
    cache = KVCache([layer(), layer()], context_length=1000, n_slots=2, kv_type="f32")
    _, k0, v0 = feed(cache, 1, 0, 5)
    span, k1, v1 = feed(cache, 1, 5, 700, seed=1)
    assert_holds(cache, span, np.concatenate([k0, k1]), np.concatenate([v0, v1]))


def test_rows_go_to_the_pages_named_and_to_no_other():
    cache = KVCache([layer(), layer()], context_length=400, n_slots=2, n_pages=9, kv_type="f32")
    pages = [7, 0, 4]
    span, k, v = feed(cache, 1, 0, 2 * PAGE + 5, pages=pages)
    assert_holds(cache, span, k, v)
    keys, values = cache.arrays(1)
    np.testing.assert_array_equal(keys[4, :, :5].transpose(1, 0, 2), k[2 * PAGE :] + 1)
    others = [page for page in range(9) if page not in pages]
    assert not keys[others].any()
    assert not values[others].any()
    assert not keys[4, :, 5:].any()
    # Another sequence reads the first page through its own table, and writes behind it.
    other, k2, v2 = feed(cache, 0, PAGE, 3, seed=2, pages=[7, 8])
    assert_holds(cache, other, np.concatenate([k[:PAGE], k2]), np.concatenate([v[:PAGE], v2]))


def test_pages_are_copied_saved_and_restored():
    cache = KVCache([layer(), layer()], context_length=400, n_slots=1, n_pages=6, kv_type="f16")
    span, *_ = feed(cache, 0, 0, 100, pages=[1, 3])
    before = [cache.view(index, span) for index in range(2)]
    cache.copy_pages([(1, 5), (3, 0)])
    saved = cache.save_pages([5, 0])
    feed(cache, 0, 0, 6 * PAGE, seed=3, pages=[5, 4, 3, 2, 1, 0])
    cache.load_pages(saved, [2, 4])
    restored = Span(slot=0, row=0, n_rows=100, n_past=0, pages=[2, 4])
    cache.reserve([restored])
    for index in range(2):
        for old, new in zip(before[index], cache.view(index, restored), strict=True):
            np.testing.assert_array_equal(old.view(np.uint16), new.view(np.uint16))


def test_what_a_token_takes():
    cache = KVCache([layer(), layer()], context_length=300, n_slots=2, kv_type="f16")
    assert cache.bytes_per_token == 2 * 2 * (4 + 3) * 2
    assert cache.n_pages == 2 * 5
    arrays = [array for index in range(2) for array in cache.arrays(index)]
    assert sum(array.nbytes for array in arrays) == cache.n_pages * PAGE * cache.bytes_per_token


def test_rows_of_8_bits_come_back_rounded_wherever_their_pages_go():
    mixers = [layer(key_width=64, value_width=32), layer(key_width=32, value_width=96)]
    cache = KVCache(mixers, context_length=400, n_pages=6, kv_type="q8_0")
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(100, 2, width)).astype(np.float32) for width in (64, 32))
    span = Span(slot=0, row=0, n_rows=100, n_past=0, pages=[1, 3])
    cache.reserve([span])
    cache.append(0, span, k, v)
    cache.copy_pages([(1, 5), (3, 0)])
    saved = cache.save_pages([5, 0])
    cache.append(0, span, v.repeat(2, axis=2), v)
    cache.load_pages(saved, [2, 4])
    moved = Span(slot=0, row=0, n_rows=100, n_past=0, pages=[2, 4])
    cache.reserve([moved])
    for found, rows in zip(cache.view(0, moved), (k, v), strict=True):
        np.testing.assert_array_equal(found.transpose(1, 0, 2), dequantize(*quantize(rows)))
    assert cache.bytes_per_token == 2 * (96 + 128) * 34 // 32
    assert cache.page_bytes == sum(array.nbytes for each in cache.layers for array in each.paged)


def test_memory_follows_use():
    """A cache larger than this machine's memory can be had, as long as it is not filled."""
    cache = KVCache([layer(), layer()], context_length=1 << 32, n_slots=1, n_pages=1 << 20, kv_type="f16")
    before = resident_bytes()
    feed(cache, 0, 0, 100, pages=[0, (1 << 20) - 1])
    assert cache.bytes_per_token * PAGE * cache.n_pages > 3 << 30
    assert resident_bytes() - before < 300 << 20  # the slot's table of pages is written


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_overflow_changes_nothing():
    cache = KVCache([layer(), layer()], context_length=8, n_slots=2, kv_type="f32")
    span, k, v = feed(cache, 0, 0, 6)
    with pytest.raises(ContextFullError) as caught:
        cache.reserve([Span(slot=1, row=0, n_rows=2, n_past=0), Span(slot=0, row=2, n_rows=3, n_past=6)])
    assert (caught.value.length, caught.value.limit) == (9, 8)
    assert_holds(cache, span, k, v)


def test_too_few_pages_are_refused():
    cache = KVCache([layer(), layer()], context_length=200, n_pages=3)
    with pytest.raises(AssertionError, match="1 pages for 65 positions"):
        feed(cache, 0, 0, PAGE + 1, pages=[2])


def test_going_back_overwrites():
    cache = KVCache([layer(), layer()], context_length=8, kv_type="f32")
    _, k0, v0 = feed(cache, 0, 0, 8)
    span, k1, v1 = feed(cache, 0, 3, 2, seed=4)
    assert_holds(cache, span, np.concatenate([k0[:3], k1]), np.concatenate([v0[:3], v1]))


def test_a_batch_is_flat():
    batch = Batch.build([(2, [7, 8, 9], 4, Outputs.LAST), (0, [5], 0, Outputs.ALL), (1, [1, 2], 0, Outputs.NONE)])
    assert batch.token_ids.tolist() == [7, 8, 9, 5, 1, 2]
    assert batch.positions.tolist() == [4, 5, 6, 0, 0, 1]
    assert batch.output_rows.tolist() == [2, 3]
    assert [(span.slot, span.row, span.n_rows, span.n_past) for span in batch.spans] == [
        (2, 0, 3, 4),
        (0, 3, 1, 0),
        (1, 4, 2, 0),
    ]
    assert batch.spans[0].n_total == 7
