"""Sampling on the device chooses exactly what the host sampler chooses."""

import re

import numpy as np
import pytest

from engine.cuda.driver.compiler import kernel_files
from engine.cuda.sampling.sampler import (
    BINS,
    CANDIDATES,
    LIMIT_WORD,
    MAX_BLOCKS_PER_ROW,
    MAXIMA,
    NO_LIMIT,
    ROW,
    grid,
    pack_row,
)
from engine.errors import InvalidRequestError
from engine.sampling import MAX_LOGPROBS, SamplingParams
from engine.sampling.constraint import Regex
from engine.sampling.sampler import sample


def test_row_layout_equals_the_kernels():
    text = kernel_files()["sampling_common.cuh"].read_text()
    body = re.search(r"struct SamplingRow \{.*?\n(.*?)\n\};", text, re.S).group(1)
    kinds = {"float": "<f4", "int": "<i4", "u32": "<u4"}
    found = []
    for line in body.splitlines():
        kind, names = re.match(r"\s*(\w+) ([^;]+);", line).groups()
        found += [(name.strip(), kinds[kind]) for name in names.split(",")]
    expected = [(name, ROW[name].str) for name in ROW.names]
    assert ROW.fields["limit"][1] == 4 * LIMIT_WORD
    assert found == expected
    for name, value in (
        ("MAXIMA", MAXIMA),
        ("CANDIDATES", CANDIDATES),
        ("BINS", BINS),
        ("TOP_LOGPROBS", MAX_LOGPROBS),
    ):
        assert int(re.search(rf"#define {name} (\d+)", text).group(1)) == value


def test_pack_row():
    params = SamplingParams(
        temperature=0.5, top_k=2**40, penalty_last_n=-1, logit_bias={3: 1.0, 5: -np.inf}, logprobs=4
    )
    row = pack_row(params, 2**63 + 5, 7)[0]
    assert row["temperature"] == 0.5
    assert row["top_k"] == 2**31 - 1
    assert row["penalty_last_n"] == -1
    assert (row["seed_low"], row["seed_high"], row["output_index"]) == (5, 2**31, 7)
    assert (row["n_bias"], row["n_logprobs"]) == (2, 4)
    assert pack_row(SamplingParams(), 0, 0)[0]["n_logprobs"] == -1


@pytest.mark.parametrize("multiprocessors", [1, 10, 20, 40, 84, 132, 170])
def test_grid_stays_resident(multiprocessors):
    for n_rows in (1, 2, 3, 8, 64, 256):
        blocks, at_once = grid(n_rows, multiprocessors)
        assert 1 <= blocks * at_once <= multiprocessors
        assert blocks <= MAX_BLOCKS_PER_ROW
        assert MAXIMA % blocks == 0
        assert at_once <= n_rows


# ---- on a GPU -----------------------------------------------------------------------------------------------------
CONTEXT = 600


def random_params(rng, vocab_size):
    """Any mix of settings, the simple ones more often."""
    bias = None
    if rng.random() < 0.2:
        ids = rng.choice(vocab_size, size=min(vocab_size - 1, int(rng.integers(1, 900))), replace=False)
        bias = {int(i): float(rng.choice([-np.inf, rng.normal() * 4])) for i in ids}
    penalized = rng.random() < 0.3
    return SamplingParams(
        temperature=float(rng.choice([0, 0.1, 0.8, 1.0, 2.5])),
        top_k=int(rng.choice([0, 0, 1, 2, 40, 40, 64, 100, 500, 1024, 1025, 3000])),
        top_p=float(rng.choice([1.0, 1.0, 0.95, 0.5, 0.01])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.5, 1e-7])),
        typical_p=float(rng.choice([1.0, 1.0, 1.0, 0.9, 0.2])),
        repetition_penalty=float(rng.choice([1.0, 1.1, 0.8])) if penalized else 1.0,
        presence_penalty=float(rng.choice([0.0, 0.7, -0.3])) if penalized else 0.0,
        frequency_penalty=float(rng.choice([0.0, 0.2])) if penalized else 0.0,
        penalty_last_n=int(rng.choice([-1, 0, 1, 64, 10_000])),
        logit_bias=bias,
        logprobs=int(rng.choice([0, 1, 5, 32])) if rng.random() < 0.25 else None,
        constraint=Regex("its mask is made by random_mask()") if rng.random() < 0.3 else None,
        free_logprobs=bool(rng.random() < 0.5),
    )


def random_mask(rng, vocab_size):
    """Allowed tokens, a bit each: many, few, one."""
    allowed = rng.random(vocab_size) < rng.choice([0.9, 0.1, 20 / vocab_size])
    allowed[rng.integers(vocab_size)] = True
    words = np.zeros(-(-vocab_size // 32) * 32, bool)
    words[:vocab_size] = allowed
    return np.packbits(words, bitorder="little").view(np.uint32)


def random_logits(rng, vocab_size):
    kind = rng.integers(0, 8)
    logits = rng.standard_normal(vocab_size) * rng.choice([0.01, 1, 3, 20])
    if kind == 0:
        logits = np.round(logits)  # many ties
    elif kind == 1:
        logits = np.sort(logits)[:: rng.choice([-1, 1])]  # the best ones side by side
    elif kind == 2:
        logits[rng.random(vocab_size) < 0.5] = -np.inf
        logits[rng.integers(vocab_size)] = 1.0
    elif kind == 3:
        logits[:] = rng.choice([0.0, -7.5])
    elif kind == 4:
        logits *= 1e30
    return logits.astype(np.float32)


def put(array, at, values):
    """As Staging.put, at once."""
    array.reshape(-1)[at : at + values.size].set(np.ascontiguousarray(values).reshape(-1))


def new_sampler(vocab_size, context, n_slots, n_rows=None, ring=64):
    import cupy

    from engine.cuda.sampling.sampler import DeviceSampler, Results

    shape = ring, n_rows or n_slots
    results = Results(
        cupy.full(shape, -1, np.int32),
        cupy.zeros(shape, np.float32),
        cupy.zeros((*shape, MAX_LOGPROBS), np.int32),
        cupy.zeros((*shape, MAX_LOGPROBS), np.float32),
    )
    return DeviceSampler(vocab_size, context, n_slots, results=results)


def set_slot(sampler, slot, params, seed, index, history, limit=NO_LIMIT):
    sampler.set_slot(slot, pack_row(params, seed, index, limit), params, put)
    sampler.set_history(slot, history, put)


def check_against_host(sampler, step, row, params, logits, history, index, seed, allowed=None):
    results, at = sampler.results, (step % sampler.ring, row)
    try:
        expected = sample(logits, params, history=history, output_index=index, seed=seed, allowed=allowed)
    except InvalidRequestError:  # the bias or the mask forbids everything
        assert int(results.tokens[at]) == -1
        return
    assert int(results.tokens[at]) == expected.token_id, (params, history[-5:], index, seed)
    if params.logprobs is not None:
        ids, values = zip(*expected.top_logprobs, strict=True) if expected.top_logprobs else ((), ())
        assert tuple(results.top_ids[at][: len(ids)].get().tolist()) == ids
        np.testing.assert_allclose(float(results.logprobs[at]), expected.logprob, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(results.top_logprobs[at][: len(ids)].get(), values, rtol=1e-6, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("vocab_size", "n_rows", "rounds"),
    [
        *((5, 8, 60), (33, 3, 60), (1000, 64, 12), (4096, 8, 60), (4096, 150, 3)),
        *((50_257, 5, 12), (50_257, 40, 3), (128_256, 1, 60), (128_256, 20, 3)),
    ],
)
def test_random_mixes(vocab_size, n_rows, rounds):
    import cupy

    rng = np.random.default_rng(vocab_size + n_rows)
    sampler = new_sampler(vocab_size, CONTEXT, n_rows + 2)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        next_token = cupy.zeros(n_rows + 2, np.int32)
        for step in range(rounds):
            slots = rng.permutation(n_rows + 2)[:n_rows].astype(np.int32)
            length = rng.integers(1, CONTEXT, n_rows).astype(np.int32)
            logits = np.stack([random_logits(rng, vocab_size) for _ in range(n_rows)])
            limits = np.where(rng.random(n_rows) < 0.2, length, rng.integers(1, CONTEXT, n_rows)).tolist()
            cases = []
            masks = np.zeros((n_rows + 2, -(-vocab_size // 32)), np.uint32)
            for row in range(n_rows):
                masks[slots[row]] = random_mask(rng, vocab_size)
                params, seed, index = random_params(rng, vocab_size), int(rng.integers(2**63)), int(rng.integers(1000))
                history = rng.integers(0, min(vocab_size, 200), length[row]).tolist()
                set_slot(sampler, slots[row], params, seed, index, history, limits[row])
                cases.append((params, history, index, seed))
            padding = rng.random(n_rows) < 0.1
            given = np.full(n_rows + 2, 77, np.int32)  # slots outside the launch keep theirs
            given[slots] = np.where(padding, -1, length - 1)
            positions = cupy.asarray(given)
            sampler.launch(
                cupy.asarray(logits),
                positions,
                next_token,
                slots=cupy.asarray(slots),
                masks=cupy.asarray(masks) if any(params.constraint for params, *_ in cases) else None,
                stream=stream,
            )
            tokens, moved = next_token.get(), positions.get()
            assert int(sampler.step[0]) == step + 1
            assert not sampler.control.any()
            assert not sampler.histograms.any()
            assert all(moved[slot] == 77 for slot in set(range(n_rows + 2)) - set(slots.tolist()))
            for row, (params, history, index, seed) in enumerate(cases):
                token, slot = int(sampler.results.tokens[step % sampler.ring, row]), slots[row]
                if padding[row]:
                    assert (token, moved[slot]) == (-1, -1)
                    continue
                allowed = masks[slot] if params.constraint else None
                check_against_host(sampler, step, row, params, logits[row], history, index, seed, allowed)
                assert tokens[slot] == token
                if token >= 0 and length[row] < CONTEXT:
                    assert int(sampler.history[slot, length[row]]) == token
                goes_on = token >= 0 and length[row] < min(CONTEXT, limits[row])
                assert moved[slot] == (length[row] if goes_on else -1)


@pytest.mark.gpu
def test_unusable_logits_stop_the_row():
    import cupy

    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=0, logprobs=3)):
        logits = cupy.zeros((4, 3000), np.float32)
        logits[0, 2999] = np.nan
        logits[1, 7] = np.inf
        logits[2] = -np.inf
        sampler = new_sampler(3000, 16, 4)
        for slot in range(4):
            set_slot(sampler, slot, params, 1, 0, [1, 2])
        positions, next_token = cupy.full(4, 1, np.int32), cupy.zeros(4, np.int32)
        sampler.launch(logits, positions, next_token)
        assert next_token.get()[:3].tolist() == [-1, -1, -1]
        assert positions.get().tolist() == [-1, -1, -1, 2]
        assert int(next_token[3]) >= 0
        sampler.launch(logits, positions, next_token)
        assert sampler.results.tokens[1, :3].get().tolist() == [-1, -1, -1]


@pytest.mark.gpu
def test_replayed_graph_generates_what_the_host_does():
    import cupy

    vocab_size, steps = 20_000, 40
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((3, vocab_size)) * 2).astype(np.float32)
    mixes = [
        SamplingParams(repetition_penalty=1.3, penalty_last_n=8),
        SamplingParams(temperature=0, frequency_penalty=0.5, penalty_last_n=-1),
        SamplingParams(top_k=0, presence_penalty=1.0, logprobs=2),
    ]
    sampler = new_sampler(vocab_size, 100, 3)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        device_logits, positions, next_token = cupy.asarray(logits), cupy.zeros(3, np.int32), cupy.zeros(3, np.int32)
        stream.begin_capture()
        sampler.launch(device_logits, positions, next_token, stream=stream)
        graph = stream.end_capture()
        runs = []
        for _ in range(2):
            sampler.step[:] = 0
            for slot, params in enumerate(mixes):
                set_slot(sampler, slot, params, 99, 0, [5, 6, 7])
            positions[:] = 2
            for _ in range(steps):
                graph.launch(stream)
            runs.append(sampler.results.tokens[:steps].get())
    assert np.array_equal(*runs)
    for row, params in enumerate(mixes):
        history = [5, 6, 7]
        for step in range(steps):
            check_against_host(sampler, step, row, params, logits[row], history, step, 99)
            history.append(int(runs[0][step, row]))


@pytest.mark.gpu
def test_two_engines_at_once():
    import cupy

    vocab_size, steps, n_rows = 100_000, 100, 8
    rng = np.random.default_rng(8)
    logits = cupy.asarray((rng.standard_normal((n_rows, vocab_size)) * 3).astype(np.float32))
    engines = []
    for params in (SamplingParams(top_k=0, typical_p=0.9), SamplingParams(top_k=700, min_p=0)):
        sampler, stream = new_sampler(vocab_size, 200, n_rows, ring=steps), cupy.cuda.Stream(non_blocking=True)
        for slot in range(n_rows):
            set_slot(sampler, slot, params, slot, 0, [1])
        engines.append((sampler, stream, cupy.zeros(n_rows, np.int32), cupy.zeros(n_rows, np.int32)))
    cupy.cuda.Device().synchronize()
    for _ in range(steps):
        for sampler, stream, positions, next_token in engines:
            sampler.launch(logits, positions, next_token, stream=stream)
    together = []
    for sampler, stream, _, _ in engines:
        stream.synchronize()
        together.append(sampler.results.tokens.get())
    for (sampler, stream, positions, next_token), tokens in zip(engines, together, strict=True):
        assert (tokens >= 0).all()
        sampler.step[:] = 0
        positions[:] = 0
        sampler.rows[:, 11] = 0  # output_index
        cupy.cuda.Device().synchronize()
        for _ in range(steps):
            sampler.launch(logits, positions, next_token, stream=stream)
        stream.synchronize()
        assert np.array_equal(sampler.results.tokens.get(), tokens)
