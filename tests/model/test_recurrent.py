"""Recurrent layers on the CPU: logits against plain loops in float64, and states in any use of the cache."""

import itertools

import numpy as np
import pytest

from engine.config import PAGE
from engine.cpu.caches.model import KVCache
from engine.cpu.recurrent import mamba as recurrent
from engine.errors import ModelFileError, UnsupportedModelError
from engine.gguf.quants import GGMLType
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs, Span
from engine.model.config import AttentionConfig, MambaConfig
from engine.model.loader import load_model
from tests.support.backends import backends, feed
from tests.support.models.gguf_builder import build_gguf
from tests.support.models.recurrent_models import NaiveMamba, tiny_mamba, tiny_mamba_parts

TOKENS = np.random.default_rng(5).integers(0, 256, 45).tolist()


@pytest.fixture
def opened(tmp_path):
    """Opens backends over tiny models of its own; closes all."""
    numbers = itertools.count()
    with backends() as open_backend:

        def opened_over(path=None, *, parts=None, **options):
            path = path or tiny_mamba(tmp_path / f"{next(numbers)}.gguf", **(parts or {}))
            return open_backend(path, **options)

        yield opened_over


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize(
    "parts",
    [{}, {"norm_dt_b_c": True, "dt_rank": 16}, {"conv": 2, "state": 1, "dt_rank": 1}, {"weight_type": GGMLType.F16}],
)
def test_logits_are_those_of_plain_loops(opened, parts, reference):
    truth = NaiveMamba(*tiny_mamba_parts(**parts)).logits(TOKENS)
    backend = opened(parts=parts, reference=reference)
    found = feed(backend, 0, TOKENS)
    assert ((found - truth) ** 2).mean() / (truth**2).mean() < 1e-10
    assert np.abs(truth).max() > 1  # and long ago tokens matter: the state does remember
    other = NaiveMamba(*tiny_mamba_parts(**parts)).logits([TOKENS[0] ^ 1, *TOKENS[1:]])
    assert np.abs(other[20] - truth[20]).max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"activation_bits": 8}, {"activation_bits": 16}], ids=["float32", "8 bits", "16 bits"]
)
def test_bits_do_not_depend_on_pieces_or_batches(opened, options):
    backend = opened(parts={"weight_type": GGMLType.Q8_0, "dt_rank": 32}, **options)
    whole = feed(backend, 0, TOKENS)
    one_by_one = np.concatenate([feed(backend, 1, [token], i) for i, token in enumerate(TOKENS)])
    np.testing.assert_array_equal(whole, one_by_one)
    parts, start = [], 0
    for size in (1, 2, 7, 16, 17, 2):  # beside sequences at other places
        batch = [(2, TOKENS[:3], 0, Outputs.NONE), (0, TOKENS[start : start + size], start, Outputs.ALL)]
        if start > 0:
            batch.append((1, TOKENS[: size + 1], 0, Outputs.NONE))
        parts.append(backend.forward(Batch.build(batch)))
        start += size
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("name", ["short_convolution", "selective_scan", "gated_output"])
@pytest.mark.parametrize("call", range(4))
def test_a_step_cut_short_anywhere_can_be_repeated(opened, monkeypatch, name, call):
    """Two sequences, one reading a prompt and one decoding, in two layers."""
    backend = opened()
    ways = [backend, opened(backend.model.gguf.path)]
    for one in ways:
        feed(one, 0, TOKENS[:9], place=0)
        feed(one, 1, TOKENS[:5], place=0)
    batch = Batch.build(
        [(0, [7], 9, Outputs.ALL, None, 1), (1, TOKENS[5:12], 5, Outputs.ALL, None, 1)],
    )
    original, calls = getattr(recurrent, name), []

    def failing(*arguments):
        calls.append(name)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recurrent, name, failing)
        try:
            backend.forward(batch)
        except KeyboardInterrupt:
            pass
        else:
            assert name == "gated_output"  # once per layer, not once per sequence
            assert call >= 2
    backend.forward(batch)  # and once more, whole
    np.testing.assert_array_equal(backend.forward(batch), ways[1].forward(batch))
    behind = Batch.build([(0, [8, 9], 10, Outputs.ALL, None, 2), (1, [1], 12, Outputs.ALL, None, 2)])
    np.testing.assert_array_equal(backend.forward(behind), ways[1].forward(behind))


def test_states_are_kept_moved_and_brought_back(opened):
    backend = opened(checkpoints=2)
    states = backend.cache.states
    whole = feed(backend, 0, TOKENS, place=0)
    feed(backend, 1, TOKENS[:30], place=0)
    states.checkpoint(1, 1, 1)
    saved = states.save(1, 1)
    states.move(1, 2, 1)
    np.testing.assert_array_equal(feed(backend, 2, TOKENS[30:], 30, place=1), whole[30:])
    feed(backend, 1, TOKENS[::-1], place=0)
    states.restore(1, 1, 0)
    np.testing.assert_array_equal(feed(backend, 1, TOKENS[30:], 30, place=0), whole[30:])
    states.load(saved, 0, 5)
    np.testing.assert_array_equal(feed(backend, 0, TOKENS[30:], 30, place=5), whole[30:])
    assert states.n_checkpoints == 2


def test_an_item_in_several_batches_moves_by_one_place(opened):
    """What a device does with more rows than fit one batch: the later ones read the state where they write it."""
    backend = opened()
    whole = feed(backend, 0, TOKENS, place=0)
    for _ in range(2):  # and again from the beginning
        parts = [feed(backend, 1, TOKENS[:30], place=4)]
        for first, end in ((30, 31), (31, 45)):
            batch = Batch.build([(1, TOKENS[first:end], first, Outputs.ALL, None, 5, 5)])
            parts.append(backend.forward(batch))
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_memory_is_planned(opened):
    backend = opened(max_sequences=3, checkpoints=5, n_pages=7)
    plan = backend.memory_plan()
    per_state = 2 * 4 * (128 * 3 + 128 * 16)
    assert (plan.kv_bytes_per_token, plan.kv_bytes) == (0, 0)
    assert plan.state_bytes == (3 * 2 + 5) * per_state
    assert plan.total_bytes == plan.weights_bytes + plan.state_bytes + plan.scratch_bytes


def test_attention_and_recurrent_layers_share_a_cache():
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, key_width=4, value_width=4, scale=1.0, rope=None)
    mamba = MambaConfig(inner=4, state=2, conv_width=3, dt_rank=1)
    cache = KVCache([mamba, attention], context_length=PAGE, n_slots=2, kv_type="f32", n_checkpoints=1)
    assert (cache.bytes_per_token, cache.bytes_per_state) == (2 * 4 * 4, 4 * (4 * 2 + 4 * 2))
    span = Span(slot=1, row=0, n_rows=2, n_past=0, place=0)
    cache.reserve([span])
    rows = np.ones((2, 1, 4), dtype=np.float32)
    cache.append(1, span, rows, 2 * rows)
    assert not any(state.any() for state in cache.state(0, span))
    cache.store_state(0, span, (np.full((4, 2), 3.0), np.full((4, 2), 4.0)))
    cache.states.checkpoint(1, 1, 0)
    saved = cache.save_pages([1])
    cache.copy_pages([(1, 0)])
    cache.states.restore(0, 0, 6)
    cache.load_pages(saved, [1])
    later = Span(slot=0, row=0, n_rows=1, n_past=2, place=6, pages=[0])
    cache.reserve([later])
    assert [float(state.max()) for state in cache.state(0, later)] == [3.0, 4.0]
    keys, values = cache.view(1, later)
    assert (keys[0, :2].max(), values[0, :2].min()) == (1.0, 2.0)


def test_a_state_that_is_gone_is_not_made_up(opened):
    backend = opened()
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        feed(backend, 0, TOKENS[start:stop], start)
    feed(backend, 0, TOKENS[6:7], 6)
    with pytest.raises(AssertionError, match="no state after 5 tokens"):
        feed(backend, 0, TOKENS[5:6], 5)


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("mamba.ssm.conv_kernel", 1, ModelFileError, "ssm.conv_kernel is 1; allowed is an integer from 2"),
        ("mamba.ssm.state_size", 17, UnsupportedModelError, "ssm_x.weight has shape"),
        ("mamba.ssm.group_count", 4, UnsupportedModelError, "mamba.ssm.group_count is 4"),
    ],
)
def test_wrong_files_are_refused(tmp_path, key, value, error, words):
    meta, tensors = tiny_mamba_parts()
    path = tmp_path / "wrong.gguf"
    path.write_bytes(build_gguf(meta | {key: value}, tensors))
    with open_gguf(path) as gguf, pytest.raises(error, match=words):
        load_model(gguf)


def test_softplus_is_exact_at_both_ends():
    x = np.array([-80, -20, -1, 0, 1, 19.9, 20.1, 100], dtype=np.float32)
    expected = np.logaddexp(0, x.astype(np.float64))
    np.testing.assert_allclose(recurrent.softplus(x), expected, rtol=3e-7)
