"""Attention over the positions that an indexer chooses, against loops in float64 and itself."""

import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.cpu.bricks.indexer import Indexer, best
from engine.cpu.caches.model import KVCache
from engine.errors import ModelFileError
from engine.gguf.quants import dequantize
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs, Span
from engine.model.loader import load_model
from tests.support.models.gguf_builder import build_gguf
from tests.support.models.hybrid_models import tiny_hybrid_parts
from tests.support.models.indexer_models import (
    BLOCK,
    INDEX_WIDTH,
    TOP_BLOCKS,
    TOP_K,
    NaiveBlocks,
    NaiveTokens,
    blocks,
    tokens,
)
from tests.support.models.naive_model import CONTEXT, TOKENS

CASES = {"tokens": (tokens, NaiveTokens), "blocks": (blocks, NaiveBlocks)}


def run(folder, file, feeds, **options):
    """Logits of every feed, one after the other."""
    with open_gguf(file.write(folder)) as gguf:
        backend = CpuBackend(load_model(gguf), threads=2, max_sequences=3, **options)
        rows = [backend.forward(Batch.build(feed)) for feed in feeds]
        backend.close()
        del backend
    return rows


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_formulas(tmp_path, case, reference):
    make, naive = CASES[case]
    file, facts = make()
    expected = naive(file, **facts).logits(TOKENS)
    everything = naive(file, **facts)
    everything.best = lambda scores, count: range(len(scores))
    assert np.abs(everything.logits(TOKENS) - expected)[6:].max() > 0.1, (
        "the choice changes nothing: this tests nothing"
    )
    one_by_one = [[(1, [token], i, Outputs.ALL)] for i, token in enumerate(TOKENS)]
    whole, *single = run(
        tmp_path, file, [[(0, TOKENS, 0, Outputs.ALL)], *one_by_one], reference=reference, kv_type="f32"
    )
    np.testing.assert_allclose(whole, expected, atol=2e-4)
    np.testing.assert_allclose(np.concatenate(single), expected, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_pieces_or_batches(tmp_path, case):
    file, _ = CASES[case][0]()
    pieces = [(0, 1), (1, 3), (3, 5), (5, 12)]
    feeds = [[(0, TOKENS, 0, Outputs.ALL)]]
    feeds += [[(2, TOKENS[:7], 0, Outputs.NONE), (1, TOKENS[a:b], a, Outputs.ALL)] for a, b in pieces]
    whole, *parts = run(tmp_path, file, feeds)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def pooled_choices(t, x, top_k, ratio):
    """Positions for every row of x (T, D) from the definition: whole blocks by their score, and what is behind them."""

    def norm(v, weight):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5) * weight

    def turn(v, position, half=16):
        out, angles = v.copy(), position * 10000.0 ** (-np.arange(half) / half)
        first, second = v[..., :half], v[..., half : 2 * half]
        out[..., :half] = first * np.cos(angles) - second * np.sin(angles)
        out[..., half : 2 * half] = first * np.sin(angles) + second * np.cos(angles)
        return out

    keys, choices = x @ t["indexer.k_proj.weight"].T, []
    for position, row in enumerate(x):
        q = (t["indexer.q_proj.weight"] @ row).reshape(4, -1)
        q, n_full = turn(norm(q, t["indexer.q_norm.weight"]), position), (position + 1) // ratio
        scores = []
        for block in range(n_full):
            mean = keys[block * ratio : (block + 1) * ratio].mean(0)
            scores.append(np.maximum(q @ turn(norm(mean, t["indexer.k_norm.weight"]), block * ratio), 0.0).sum())
        taken = sorted(range(n_full), key=lambda block: -scores[block])[: top_k // ratio]
        inside = {block * ratio + place for block in taken for place in range(ratio)}
        choices.append(sorted(inside | set(range(n_full * ratio, position + 1))))
    return choices


def test_pooled_blocks_are_chosen_whole_beside_the_tail(tmp_path):
    meta, tensors = tiny_hybrid_parts("qwen4exp")
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build_gguf(meta, tensors))
    with open_gguf(path) as gguf:
        layer = load_model(gguf).weights.layers[1]
        config, weights = layer.config.attention.indexer, layer.attention.indexer
        x = np.random.default_rng(3).normal(size=(41, 64)).astype(np.float32)
        indexer = Indexer(config, weights, lambda one, y: y @ dequantize(one.weight.raw, one.weight.type).T)
        queries, keys = indexer.inputs(x, None, np.arange(len(x), dtype=np.int32))
        found = indexer.choose(queries, Span(0, 0, len(x), 0), lambda: keys)
        del layer, weights, indexer
    own = {name.removeprefix("blk.1."): one.astype(np.float64) for name, one in tensors.items() if "blk.1." in name}
    expected = pooled_choices(own, x.astype(np.float64), 12, 4)
    assert found.n_all == config.all_chosen == 15
    assert [positions.tolist() for (positions,) in found.chosen] == expected[15:]
    assert len({len(positions) for positions in expected[15:]}) == 4, "tails of every length"


def test_the_best_are_those_of_a_sorted_list():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        for count in (1, 2, 5, 39, 40, 50):
            scores = rng.integers(0, 6, n).astype(np.float32)  # many are equal
            expected = sorted(sorted(range(n), key=lambda i: -scores[i])[:count])
            assert best(scores, count).tolist() == expected
    assert best(np.array([np.nan, 1.0, np.nan, -np.inf], np.float32), 2).tolist() == [0, 1]


@pytest.mark.parametrize(("case", "widths"), [("tokens", (48, 48)), ("blocks", (64, 64))])
def test_keys_of_an_indexer_are_cached_with_the_others(tmp_path, case, widths):
    file, _ = CASES[case][0]()
    with open_gguf(file.write(tmp_path)) as gguf:
        mixers = [layer.mixer for layer in load_model(gguf).config.layers]
    cache = KVCache(mixers, context_length=CONTEXT, kv_type="f16")
    own = [INDEX_WIDTH if mixer.indexer else 0 for mixer in mixers]
    assert [layer.bytes_per_token for layer in cache.layers] == [
        2 * sum(pair) for pair in zip(widths, own, strict=True)
    ]
    assert cache.page_bytes == sum(array.nbytes for layer in cache.layers for array in layer.paged)


def test_up_to_how_many_positions_all_are_chosen(tmp_path):
    for case, expected in (("tokens", TOP_K), ("blocks", TOP_BLOCKS * BLOCK)):
        with open_gguf(CASES[case][0]()[0].write(tmp_path)) as gguf:
            assert load_model(gguf).config.layers[1].attention.indexer.all_chosen == expected


@pytest.mark.parametrize(
    ("case", "key", "value", "words"),
    [
        ("blocks", "attention.indexer.head_count", 1, "head_count is 1 and layer 1 has 2 key/value heads"),
        ("blocks", "attention.indexer.block_size", 0, "allowed is an integer from 1"),
        ("tokens", "attention.indexer.key_length", 8, "allowed is an integer from 16"),
        ("tokens", "attention.indexer.top_k", 0, "allowed is an integer from 1"),
    ],
)
def test_wrong_files_are_refused(tmp_path, case, key, value, words):
    file, _ = CASES[case][0]()
    file.meta[key] = value
    with open_gguf(file.write(tmp_path)) as gguf, pytest.raises(ModelFileError, match=words):
        load_model(gguf)
