"""The forward pass against an independent one: float64, loops over positions and heads, written from the formulas."""

import numpy as np
import pytest

from engine.config import PAGE
from engine.cpu.backend import CpuBackend
from engine.errors import ContextFullError, InvalidRequestError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.models.small_models import (
    CASES,
    EXPERTS,
    TOKENS,
    Naive,
    all_logits,
    make,
    with_experts,
    with_fused_qkv,
)

BACKENDS = []


@pytest.fixture(autouse=True)
def close_backends():
    yield
    for backend in BACKENDS:
        backend.close()
        backend.model.gguf.close()
    BACKENDS.clear()


def opened(path, **options):
    gguf = open_gguf(path)
    BACKENDS.append(CpuBackend(load_model(gguf), **({"threads": 1, "reference": True, "kv_type": "f32"} | options)))
    return BACKENDS[-1]


def step(backend, tokens, slot=0):
    rows = [backend.forward(Batch.build([(slot, [t], i, Outputs.LAST)])) for i, t in enumerate(tokens)]
    return np.concatenate(rows)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_the_formulas(tmp_path, case):
    meta, tensors, path = make(tmp_path, **case)
    expected = Naive(meta, tensors).logits(TOKENS)
    backend = opened(path, max_sequences=2)
    # float32 against float64: about 1e-6 of logits whose spread is about 3
    np.testing.assert_allclose(all_logits(backend, TOKENS), expected, atol=5e-5)
    np.testing.assert_allclose(step(backend, TOKENS, slot=1), expected, atol=5e-5)


def test_fused_projections_are_slices(tmp_path):
    meta, tensors, path = make(tmp_path)
    expected = Naive(meta, tensors).logits(TOKENS)
    _, _, path = make(tmp_path, change=with_fused_qkv)
    np.testing.assert_allclose(all_logits(opened(path), TOKENS), expected, atol=5e-5)


def test_per_layer_head_counts(tmp_path):
    _, _, path = make(tmp_path, metadata={"attention.head_count_kv": [2, 2]})
    same = all_logits(opened(path), TOKENS)
    _, _, path = make(tmp_path)
    np.testing.assert_array_equal(same, all_logits(opened(path), TOKENS))

    def narrow(tensors):
        for which in "kv":
            name = f"blk.1.attn_{which}.weight"
            tensors[name] = tensors[name][:16]

    _, tensors, path = make(tmp_path, metadata={"attention.head_count_kv": [2, 1]}, change=narrow)
    backend = opened(path)
    assert [layer.attention.n_kv_heads for layer in backend.config.layers] == [2, 1]
    # Sharing one key/value head equals having two equal ones.
    for which in "kv":
        name = f"blk.1.attn_{which}.weight"
        tensors[name] = np.concatenate([tensors[name]] * 2)
    meta, _, _ = make(tmp_path)
    np.testing.assert_allclose(all_logits(backend, TOKENS), Naive(meta, tensors).logits(TOKENS), atol=5e-5)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
def test_a_batch_of_several_sequences(tmp_path, reference):
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=6, reference=reference)
    first, second = TOKENS[:5], TOKENS[3:]
    alone = all_logits(backend, first), all_logits(backend, second, slot=1)
    together = backend.forward(Batch.build([(3, first[:4], 0, Outputs.NONE), (2, second[:-1], 0, Outputs.ALL)]))
    np.testing.assert_allclose(together, alone[1][:-1], atol=2e-5)
    # Now one row of each, and a prompt chunk beside them.
    parts = [
        (3, first[4:], 4, Outputs.LAST),
        (4, second, 0, Outputs.LAST),
        (2, second[-1:], len(second) - 1, Outputs.LAST),
    ]
    mixed = backend.forward(Batch.build(parts))
    np.testing.assert_allclose(mixed, np.stack([alone[0][-1], alone[1][-1], alone[1][-1]]), atol=2e-5)


def test_single_rows_do_not_depend_on_company(tmp_path):
    """Bit for bit: a decode step gives a sequence the same logits whatever runs beside it."""
    _, _, path = make(tmp_path, metadata=EXPERTS, change=with_experts)
    for reference in (True, False):
        backend = opened(path, max_sequences=3, reference=reference)
        for slot in range(3):
            all_logits(backend, TOKENS[slot:], slot=slot)
        n = [len(TOKENS) - slot for slot in range(3)]
        alone = backend.forward(Batch.build([(1, [42], n[1], Outputs.LAST)]))
        together = backend.forward(Batch.build([(slot, [42 - slot + 1], n[slot], Outputs.LAST) for slot in range(3)]))
        if reference:  # the reference leaves the order of sums to the BLAS
            np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
        else:
            np.testing.assert_array_equal(together[1], alone[0])


def test_long_prompts_in_chunks(tmp_path, monkeypatch):
    """Bounded score and cache pieces give what one piece gives."""
    tokens = np.random.default_rng(0).integers(0, 270, 600)
    for metadata in ({}, {"attention.sliding_window": 100}):
        _, _, path = make(tmp_path, context_length=700, metadata=metadata)
        backend = opened(path, max_sequences=3)
        whole = all_logits(backend, tokens)
        monkeypatch.setattr("engine.cpu.reference.SCORE_BYTES", 4 * 4 * 600 * 7)
        monkeypatch.setattr("engine.cpu.reference.PIECE_BYTES", 1)
        np.testing.assert_allclose(all_logits(backend, tokens, slot=1), whole, atol=5e-5)
        rows = [
            backend.forward(Batch.build([(2, tokens[start : start + 150], start, Outputs.ALL)]))
            for start in range(0, 600, 150)
        ]
        np.testing.assert_allclose(np.concatenate(rows), whole, atol=5e-5)
        monkeypatch.undo()


def test_cache_types(tmp_path):
    _, _, path = make(tmp_path)
    exact = step(opened(path, kv_type="f32"), TOKENS)
    half = step(opened(path, kv_type="f16"), TOKENS)
    # Half precision keeps 11 bits: about 1e-3 of keys and values, and of logits whose spread is about 3.
    assert 0 < np.abs(half - exact).max() < 0.02
    with pytest.raises(InvalidRequestError, match=r"'q8'.*f16, f32, q8_0"):
        CpuBackend(BACKENDS[0].model, kv_type="q8")


@pytest.mark.parametrize("metadata", [{}, {"attention.sliding_window": 20}])
def test_a_cache_of_8_bits(tmp_path, metadata):
    """Kernels and plain path agree, also in how a prompt is cut, and nothing but the cache is rounded."""
    _, _, path = make(tmp_path, width=128, metadata=metadata, context_length=160)
    tokens = np.random.default_rng(0).integers(0, 270, 150)
    exact = all_logits(opened(path, kv_type="f32"), tokens)
    plain = opened(path, kv_type="q8_0", max_sequences=2)
    fast = opened(path, kv_type="q8_0", max_sequences=2, reference=False)
    found = all_logits(fast, tokens)
    # Most numbers round alike; the few on the border between two make up to a step's difference, about 1 % of a value.
    assert ((found - all_logits(plain, tokens)) ** 2).mean() < 1e-6 * (exact**2).mean()
    assert 0 < ((found - exact) ** 2).mean() < 1e-3 * (exact**2).mean()
    whole = plain.forward(Batch.build([(0, tokens, 0, Outputs.ALL)]))
    pieces = [(0, 1), (1, 70), (70, 71), (71, 150)]
    for backend, expected in ((fast, found), (plain, whole)):
        cut = [backend.forward(Batch.build([(1, tokens[a:b], a, Outputs.ALL)])) for a, b in pieces]
        np.testing.assert_allclose(np.concatenate(cut), expected, atol=0 if backend is fast else 5e-5)
    assert plain.cache.bytes_per_token == 2 * 2 * 2 * (32 + 2)
    assert plain.cache.page_bytes == sum(array.nbytes for layer in plain.cache.layers for array in layer.paged)


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_packed_weights(tmp_path, kind):
    """Kernels and reference agree on packed weights, and the reference agrees with the formulas on their values."""
    from engine.gguf.quants import dequantize

    meta, tensors, path = make(tmp_path, weight_type=kind)
    values = {
        name: dequantize(tensor[0], tensor[2]).reshape(tensor[1]) if isinstance(tensor, tuple) else tensor
        for name, tensor in tensors.items()
    }
    expected = Naive(meta, values).logits(TOKENS)
    np.testing.assert_allclose(all_logits(opened(path), TOKENS), expected, atol=5e-5)
    np.testing.assert_allclose(all_logits(opened(path, reference=False), TOKENS), expected, atol=5e-5)


def test_only_the_rows_asked_for(tmp_path):
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=2)
    assert backend.forward(Batch.build([(0, TOKENS, 0, Outputs.NONE)])).shape == (0, backend.config.vocab_size)
    last = backend.forward(Batch.build([(1, TOKENS, 0, Outputs.LAST)]))
    np.testing.assert_allclose(last[0], all_logits(backend, TOKENS)[-1], atol=2e-5)


def test_logits_in_chunks(tmp_path):
    _, _, path = make(tmp_path, context_length=300)
    backend = opened(path, max_sequences=2)
    tokens = np.arange(150)
    parts = list(backend.logit_chunks(Batch.build([(0, tokens, 0, Outputs.ALL)])))
    assert [len(part) for part in parts] == [64, 64, 22]
    np.testing.assert_allclose(np.concatenate(parts), all_logits(backend, tokens, slot=1), atol=2e-5)


def contents(backend):
    """Everything in the cache, in one row."""
    return np.concatenate([array.ravel() for layer in (0, 1) for array in backend.cache.arrays(layer)])


def test_a_full_context(tmp_path):
    _, _, path = make(tmp_path, context_length=10)
    backend = opened(path)
    all_logits(backend, TOKENS[:10])
    before = contents(backend)
    for tokens, n_past in ((TOKENS[:1], 10), (TOKENS[:3], 8), (TOKENS, 0)):
        with pytest.raises(ContextFullError) as caught:
            backend.forward(Batch.build([(0, tokens, n_past, Outputs.LAST)]))
        assert (caught.value.length, caught.value.limit) == (n_past + len(tokens), 10)
    np.testing.assert_array_equal(contents(backend), before)
    assert opened(path, context_length=12).forward(Batch.build([(0, TOKENS, 0, Outputs.LAST)])).shape[0] == 1


def test_unknown_tokens(tmp_path):
    _, _, path = make(tmp_path)
    backend = opened(path)
    for token in (-1, 272, 2**31 - 1):
        with pytest.raises(InvalidRequestError, match=f"token id {token} .*0 to 271"):
            all_logits(backend, [1, token])
    assert not contents(backend).any()


def test_an_interrupted_step_can_be_repeated(tmp_path, monkeypatch):
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=2)
    whole = step(backend, TOKENS, slot=1)
    all_logits(backend, TOKENS[:8])
    calls = 0

    def interrupted(*_):
        nonlocal calls
        calls += 1
        if calls == 2:  # the second layer: the first has written its rows
            raise KeyboardInterrupt
        return original(*_)

    original = backend._ops.attention
    monkeypatch.setattr(backend._ops, "attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.forward(Batch.build([(0, TOKENS[5:], 5, Outputs.ALL)]))
    monkeypatch.undo()
    again = backend.forward(Batch.build([(0, TOKENS[5:], 5, Outputs.ALL)]))
    np.testing.assert_allclose(again, whole[5:], atol=2e-5)


def test_memory_plan(tmp_path):
    _, _, path = make(tmp_path)
    backend = opened(path, kv_type="f16", max_sequences=3, context_length=50)
    plan = backend.memory_plan()
    assert plan.kv_bytes_per_token == 2 * 2 * (16 + 16) * 2  # layers, kv heads, key and value, two bytes
    assert plan.kv_bytes == 3 * PAGE * plan.kv_bytes_per_token  # whole pages
    assert plan.weights_bytes == sum(info.n_bytes for info in backend.model.gguf.tensors.values())
    assert plan.total_bytes == plan.weights_bytes + plan.kv_bytes + plan.scratch_bytes
