"""Attention over the positions that an indexer chooses, against loops in float64 and itself."""

import numpy as np
import pytest

from engine.cpu.backend import CpuBackend
from engine.cpu.indexer import best
from engine.cpu.kv_cache import KVCache
from engine.errors import ModelFileError
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.indexer_models import BLOCK, INDEX_WIDTH, TOP_BLOCKS, TOP_K, NaiveBlocks, NaiveTokens, blocks, tokens
from tests.support.naive_model import CONTEXT, TOKENS

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
