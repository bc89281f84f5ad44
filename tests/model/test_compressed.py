"""Attention over a window and compressed blocks, against loops in float64."""

import numpy as np
import pytest

from engine.config import PAGE
from engine.cpu.backend import CpuBackend
from engine.cpu.caches.model import KVCache
from engine.errors import ModelFileError, UnsupportedModelError
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.models.compressed_models import HEAD, TOKENS, NaiveCompressed, compressed


def logits(folder, file, *, reference):
    """Of all tokens at once, and one by one."""
    with open_gguf(file.write(folder)) as gguf:
        backend = CpuBackend(load_model(gguf), threads=2, max_sequences=2, kv_type="f32", reference=reference)
        whole = backend.forward(Batch.build([(0, TOKENS, 0, Outputs.ALL)]))
        single = [backend.forward(Batch.build([(1, [token], i, Outputs.ALL)])) for i, token in enumerate(TOKENS)]
        backend.close()
        del backend
    return whole, np.concatenate(single)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
def test_against_the_formulas(tmp_path, reference):
    file = compressed()
    expected = NaiveCompressed(file).logits(TOKENS)
    whole, single = logits(tmp_path, file, reference=reference)
    np.testing.assert_allclose(whole, expected, atol=2e-4)
    np.testing.assert_allclose(single, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("changed", "from_position"),
    [
        ({"blk.1.attn_compressor_gate.weight": -1.0}, 3),
        ({"blk.2.attn_compressor_ape.weight": -1.0}, 127),
        ({"blk.1.indexer.proj.weight": -1.0}, 15),  # with more than three blocks there is a choice
        ({"blk.0.ffn_gate_tid2eid.weight": None}, 0),
    ],
)
def test_every_part_takes_part(changed, from_position):
    """What the test against the formulas would miss if the model were insensitive to it."""
    file = compressed()
    expected = NaiveCompressed(file).logits(TOKENS)
    for name, factor in changed.items():
        tensor = file.tensors[name]
        file.tensors[name] = (3 - tensor if factor is None else tensor * factor).astype(tensor.dtype)
    differences = np.abs(NaiveCompressed(file).logits(TOKENS) - expected).max(axis=1)
    assert (differences[:from_position] == 0).all()
    assert differences[from_position:].max() > 1e-2


def test_what_is_cached(tmp_path):
    with open_gguf(compressed().write(tmp_path)) as gguf:
        mixers = [layer.mixer for layer in load_model(gguf).config.layers]
    cache = KVCache(mixers, context_length=256, kv_type="f16")
    # A key; values and gates of two halves, also of the index; a key and one of the index for every fourth position.
    numbers = [HEAD, HEAD + 8 * HEAD + 2 * HEAD // 4, HEAD + 2 * HEAD + HEAD // PAGE]
    assert [layer.bytes_per_token for layer in cache.layers] == [2 * count for count in numbers]
    assert cache.page_bytes == sum(array.nbytes for layer in cache.layers for array in layer.paged)


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("attention.compress_ratios", np.array([0, 4], np.int32), ModelFileError, "holds 2 values; allowed are 3"),
        ("attention.compress_ratios", np.array([0, 8, 128], np.int32), UnsupportedModelError, "of layer 1 is 8; supp"),
        ("attention.output_group_count", 3, ModelFileError, "4 heads in 3 groups"),
        ("attention.head_count_kv", 2, ModelFileError, "2 key/value heads; allowed are"),
        ("attention.compress_rope_freq_base", 0.5, ModelFileError, "is 0.5; allowed is a number above 1"),
        ("attention.indexer.key_length", 8, ModelFileError, "allowed is an integer from 16"),
        ("hyper_connection.count", 3, UnsupportedModelError, "has shape"),
    ],
)
def test_wrong_files_are_refused(tmp_path, key, value, error, words):
    file = compressed()
    file.meta[key] = value
    with open_gguf(file.write(tmp_path)) as gguf, pytest.raises(error, match=words):
        load_model(gguf)


def test_tokens_without_experts_are_refused(tmp_path):
    file = compressed()
    file.tensors["blk.0.ffn_gate_tid2eid.weight"][5, 0] = 4
    with open_gguf(file.write(tmp_path)) as gguf, pytest.raises(ModelFileError, match="name no expert; allowed are 0"):
        load_model(gguf)
