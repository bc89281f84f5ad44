"""The step loop on a runner whose pages hold, for every position, what a model's keys and values depend on.

A cell is a hash of all tokens up to its position and of how each was computed, as prompt or as generated token. The
runner compares every cell that a sequence reads with a slow recomputation, and draws tokens from what it read: a page
that is lost, shared by mistake, restored wrongly or found for the wrong prompt changes a text or fails a step.
"""

import gc
import random
import tracemalloc

import pytest

from engine.api.stream import Stream
from engine.scheduling.loop import EngineLoop
from tests.support.scheduling.cell_runner import CellRunner, RunnerFailure, make_job
from tests.support.scheduling.paged_world import World


@pytest.mark.parametrize("seed", range(24))
def test_any_order_of_arrivals_cancels_interrupts_and_failures(seed, monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", seed % 3)  # sequences change slots all the time
    World(seed).run()


def test_the_random_worlds_preempt_and_reuse():
    """What the test above is about does happen in it."""
    world = World(3)
    world.runner = CellRunner(8, 4, 64, 16, 3)
    world.loop = EngineLoop(world.runner)
    world.calm = True
    for _ in range(60):
        world.submit()
    while len(world.ended) < len(world.jobs):
        world.step()
    world.step()
    world.check()
    assert world.runner.n_saved > 3
    assert sum(chunks[-1].stats.cached_tokens for chunks in world.chunks.values()) > 500


@pytest.mark.parametrize("call", ["copy_pages", "save_pages", "load_pages"])
def test_a_cache_operation_that_always_fails_ends_requests_and_not_the_loop(call):
    """Each caller that waits for a text gets it or an error; none waits for ever."""
    runner = CellRunner(6, 4, 64, 16, 0)
    loop = EngineLoop(runner)

    def broken(*_):
        raise RunnerFailure(call)

    tokens = list(range(40)) * 3
    first = Stream(loop, make_job(runner, 1, tokens[:100], 1, by_step=False))
    first.result()
    setattr(runner, call, broken)
    jobs = [make_job(runner, n, tokens[:100] if n == 2 else [n] * 100, 150, by_step=False) for n in (2, 3, 4)]
    streams = [Stream(loop, job) for job in jobs]
    outcomes = []
    for stream in streams:
        try:
            outcomes.append(stream.result().finish_reason)
        except RunnerFailure:
            outcomes.append("failed")
    assert "failed" in outcomes
    assert loop.n_active == 0
    # What failed does not stay in the way of those who come later and need no such operation.
    assert Stream(loop, make_job(runner, 9, [7, 7, 7], 5, by_step=False)).result().finish_reason == "length"


def test_an_equal_prompt_computes_its_last_token_alone():
    runner = CellRunner(20, 4, 512, 16, 0)
    loop = EngineLoop(runner)
    prompt = list(range(200))
    for request_id, cached in ((1, 0), (2, 199)):
        result = Stream(loop, make_job(runner, request_id, prompt, 4, by_step=False)).result()
        assert result.stats.cached_tokens == cached
        assert result.token_ids == runner.truth[request_id].output_ids
    # Half of it, then something else: the pages are shared, and the part of a page is copied.
    result = Stream(loop, make_job(runner, 3, [*prompt[:100], 999, 998], 4, by_step=False)).result()
    assert result.stats.cached_tokens == 100


def test_generated_tokens_do_not_enter_the_prefix_cache():
    """They were computed by other kernels than a prompt's, whose bits may differ."""
    runner = CellRunner(20, 4, 512, 16, 0)
    loop = EngineLoop(runner)
    prompt = list(range(60))
    said = Stream(loop, make_job(runner, 1, prompt, 100, by_step=False)).result().token_ids
    result = Stream(loop, make_job(runner, 2, prompt + said, 4, by_step=False)).result()
    assert result.stats.cached_tokens == 60
    assert result.token_ids == runner.truth[2].output_ids


def test_a_cancelled_stream_frees_its_pages_at_once():
    runner = CellRunner(8, 4, 512, 512, 0)
    loop = EngineLoop(runner, prefix_cache=False)
    streams = [Stream(loop, make_job(runner, n, [n] * 200, 40, by_step=False)) for n in (1, 2)]
    for stream in streams:
        next(stream)
    assert loop._scheduler.blocks.n_available == 0
    streams[0].close()
    assert loop._scheduler.blocks.n_available == 4


def test_memory_stays_flat_over_many_short_requests():
    runner = CellRunner(12, 4, 512, 16, 3)
    loop = EngineLoop(runner)
    dice = random.Random(5)
    families = [[dice.randrange(50) for _ in range(90)] for _ in range(3)]
    held = []
    tracemalloc.start()
    try:
        for request_id in range(1, 901):
            prompt = [*dice.choice(families)[: dice.randint(1, 90)], dice.randrange(50)]
            stream = Stream(loop, make_job(runner, request_id, prompt, dice.randint(1, 5), by_step=False))
            if request_id % 10 == 0:
                next(stream)
                stream.close()
            stream.result()
            del stream, runner.truth[request_id], runner.first_start[request_id]
            if request_id % 300 == 0:
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[2] - held[0] < 50_000, held
    assert loop.n_active == 0
