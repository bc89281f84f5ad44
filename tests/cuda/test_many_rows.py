"""Decode steps of 64 to 512 sequences on the GPU: close to the CPU, and the same bits whatever the neighbours are."""

import numpy as np
import pytest

from engine.api.llm import BUNDLED_MODEL
from engine.request import ActiveSequence, Work
from engine.sampling import SamplingParams
from tests.support.gpu.helpers import (
    cpu_logits,
    decode_logits,
    generate,
    hopper_cupy,
    mixed_model,
    nmse,
    opened,
    pages_of,
    token_ids,
)

pytestmark = pytest.mark.gpu

SIZES = (96, 128, 256, 512)
BOUND = {"f16": 1e-5, "f32": 1e-6}
"""Of logits of a trained model against float32 with a float32 cache, as in test_parity.py."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Wide enough that blocks share columns, and cheap for the CPU."""
    hopper_cupy()
    return mixed_model(tmp_path_factory.mktemp("many"), width=1024, ffn=2048, heads=8)


def prompts(n):
    random = np.random.default_rng(4)
    return [random.integers(0, 250, 1 + i % 23).tolist() for i in range(n)]


def run(runner, slots, n_tokens, **options):
    """Samples by slot: n_tokens of each slot's own prompt, all in the same steps."""
    texts = prompts(max(slots) + 1)
    params = SamplingParams(**({"temperature": 0, "logprobs": 2} | options))
    rows = [
        ActiveSequence(slot + 1, slot, texts[slot], [], params, slot, pages=pages_of(runner, slot)) for slot in slots
    ]
    found = {slot: [] for slot in slots}
    work = [Work(one, one.prompt_ids, 0, True) for one in rows]
    for _ in range(n_tokens):
        for item, sample in zip(work, runner.step(work), strict=True):
            one = item.sequence
            one.n_cached += len(item.token_ids)
            one.output_ids.append(sample.token_id)
            found[one.slot].append((sample.token_id, sample.logprob, sample.top_logprobs))
        work = [Work(one, one.output_ids[-1:], one.n_cached, True, decode=True) for one in rows]
    for slot in slots:
        runner.release(slot)
    return found


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_steps_of_every_size_are_close_to_the_cpu(path, kv_type):
    """The trained model within the bounds of every other step; the random one, whose attention is sharper and whose
    blocks share columns, as close as prompts, where operands are rounded in the same way."""
    hopper_cupy()
    ids = np.random.default_rng(1).integers(0, 250, 40)
    for model in (BUNDLED_MODEL, path):
        with opened(model, kv_type=kv_type, max_sequences=max(SIZES), context_length=64) as runner:
            expected = cpu_logits(runner.model, ids)
            bound = BOUND[kv_type] if model is BUNDLED_MODEL else 1.5 * nmse(runner.logits(ids), expected)
            for size in SIZES:
                error = nmse(decode_logits(runner, ids, slot=size - 1), expected)
                assert error <= bound, (model, size, error, bound)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "repetition_penalty": 1.1}], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_neighbours(path, options):
    """In steps of the same number of rows, which the last slot decides: alone with it, and among all."""
    with opened(path, max_sequences=max(SIZES), context_length=64) as runner:
        for size in SIZES:
            together = run(runner, range(size), 12, **options)
            for slot in (0, 17, size // 2):
                alone = run(runner, [slot, size - 1], 12, **options)
                assert alone == {one: together[one] for one in alone}, (size, slot)


def test_replayed_steps_equal_eager_ones_run_to_run(path):
    runs = []
    for eager in (True, False, False):
        with opened(path, max_sequences=130, context_length=64, eager=eager) as runner:
            runs.append(run(runner, range(130), 10))
    assert runs[0] == runs[1] == runs[2]


def test_deterministic_rows_do_not_depend_on_the_number_of_rows(path):
    with opened(path, max_sequences=160, context_length=64, deterministic=True) as runner:
        together = run(runner, range(160), 12)
        for slot in (0, 63, 64, 159):
            alone = generate(runner, prompts(160)[slot], 12, seed=slot, logprobs=2)
            assert token_ids(alone) == [token for token, *_ in together[slot]]
            assert [(one.token_id, one.logprob, one.top_logprobs) for one in alone] == together[slot], slot


def test_operands_handed_over_change_no_bits(tmp_path):
    """Products of 64 rows, but for q, k and v, read what is left for them; those of one row convert what they read."""
    hopper_cupy()
    wide = mixed_model(tmp_path, width=2048, ffn=1024, heads=16)
    with opened(wide, max_sequences=64, context_length=64, deterministic=True) as runner:
        layers = runner._machine.weights.plan.layers
        assert all(layer.leaves_inside and layer.leaves_hidden for layer in layers)
        together = run(runner, range(64), 12)
        assert run(runner, range(64), 12) == together
        for slot in (0, 31, 63):
            alone = generate(runner, prompts(64)[slot], 12, seed=slot, logprobs=2)
            assert [(one.token_id, one.logprob, one.top_logprobs) for one in alone] == together[slot], slot


def test_steps_allocate_nothing_and_the_plan_covers_them(path):
    with opened(path, max_sequences=256, context_length=64) as runner:
        run(runner, range(256), 5)
        before = runner.pool_bytes(), runner._gpu.pool.used_bytes()
        run(runner, range(256), 8)
        assert (runner.pool_bytes(), runner._gpu.pool.used_bytes()) == before
        plan = runner.memory_plan()
        assert before[0] <= plan.weights_bytes + plan.kv_bytes + plan.scratch_bytes


def test_rows_that_take_turns_have_the_bits_of_the_steps_they_run_in(path):
    """70 sequences run 64 at a time, and so do 64 of them."""
    with opened(path, max_sequences=128, context_length=64) as runner:
        assert runner._machine.weights.plan.turns[70] == 64
        for options in ({}, {"temperature": 0.9, "repetition_penalty": 1.1}):
            among = run(runner, range(70), 20, **options)
            assert run(runner, range(64), 20, **options) == {slot: among[slot] for slot in range(64)}
