"""The KV cache: where rows go, how memory follows use, and what a full or interrupted step leaves behind."""

import numpy as np
import pytest

from engine.cpu.kv_cache import FIRST_CAPACITY, KVCache
from engine.errors import ContextFullError
from engine.model.batch import Batch, Outputs, Span
from engine.model.config import AttentionConfig


def layer(n_kv_heads=2, key_width=4, value_width=3):
    return AttentionConfig(
        n_heads=4, n_kv_heads=n_kv_heads, key_width=key_width, value_width=value_width, scale=0.5, rope=None
    )


def feed(cache, slot, n_past, n_rows, seed=0):
    rng = np.random.default_rng(seed)
    span = Span(slot=slot, row=0, n_rows=n_rows, n_past=n_past)
    k, v = rng.normal(size=(n_rows, 2, 4)).astype(np.float32), rng.normal(size=(n_rows, 2, 3)).astype(np.float32)
    cache.reserve([span])
    for index in range(2):
        cache.append(index, span, k + index, v + index)
    cache.commit([span])
    return span, k, v


def test_rows_come_back():
    cache = KVCache([layer(), layer()], context_length=1000, n_slots=2, kv_type="f32")
    _, k0, v0 = feed(cache, 1, 0, 5)
    span, k1, v1 = feed(cache, 1, 5, 700, seed=1)
    for index in range(2):
        keys, values = cache.view(index, span)
        np.testing.assert_array_equal(keys.transpose(1, 0, 2), np.concatenate([k0, k1]) + index)
        np.testing.assert_array_equal(values.transpose(1, 0, 2), np.concatenate([v0, v1]) + index)


def test_memory_follows_use():
    cache = KVCache([layer(), layer()], context_length=10**9, n_slots=4, kv_type="f16")
    assert cache.allocated_bytes == 0
    assert cache.bytes_per_token == 2 * 2 * (4 + 3) * 2
    feed(cache, 0, 0, 1)
    assert cache.allocated_bytes == FIRST_CAPACITY * cache.bytes_per_token
    feed(cache, 0, 1, FIRST_CAPACITY)
    assert cache.allocated_bytes == 2 * FIRST_CAPACITY * cache.bytes_per_token
    cache.release(0)
    assert cache.allocated_bytes == 0
    assert cache.length(0) == 0


def test_capacity_stops_at_the_context():
    cache = KVCache([layer(), layer()], context_length=300, kv_type="f16")
    feed(cache, 0, 0, 256)
    feed(cache, 0, 256, 44)
    assert cache.allocated_bytes == 300 * cache.bytes_per_token


def test_overflow_changes_nothing():
    cache = KVCache([layer(), layer()], context_length=8, n_slots=2)
    feed(cache, 0, 0, 6)
    with pytest.raises(ContextFullError) as caught:
        cache.reserve([Span(slot=1, row=0, n_rows=2, n_past=0), Span(slot=0, row=2, n_rows=3, n_past=6)])
    assert (caught.value.length, caught.value.limit) == (9, 8)
    assert (cache.length(0), cache.length(1)) == (6, 0)


def test_gaps_are_refused():
    cache = KVCache([layer(), layer()], context_length=8)
    with pytest.raises(AssertionError):
        feed(cache, 0, 1, 1)


def test_going_back_overwrites():
    cache = KVCache([layer(), layer()], context_length=8, kv_type="f32")
    feed(cache, 0, 0, 8)
    span, k, _ = feed(cache, 0, 3, 2, seed=4)
    assert cache.length(0) == 5
    np.testing.assert_array_equal(cache.view(0, span)[0].transpose(1, 0, 2)[3:], k)


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
