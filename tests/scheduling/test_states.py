"""Recurrent states under the step loop, on a runner that knows which tokens went into each (state_runner.py)."""

import pytest

from engine.api.stream import Stream
from engine.config import PAGE, STATE_BORDER
from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.actions import RestoreCheckpoint, SaveCheckpoint
from engine.scheduling.checkpoints import CheckpointPool
from engine.scheduling.loop import EngineLoop
from engine.scheduling.scheduler import Scheduler
from tests.support.scheduling.cell_runner import RunnerFailure, make_job
from tests.support.scheduling.paged_world import World
from tests.support.scheduling.state_runner import StateRunner


class StateWorld(World):
    """Random use of a model with recurrent layers."""

    def make_runner(self, **options):
        choose = self.random.choice
        options["mixed_chunk"] = max(options["mixed_chunk"], STATE_BORDER)
        return StateRunner(**options, n_checkpoints=choose([0, 1, 3, 16]), spare=choose([0, 1]))

    def make_loop(self, **options):
        return EngineLoop(self.runner, **options, checkpoint_spacing=self.random.choice([PAGE, 2 * PAGE, 512]))

    def check(self):
        super().check()
        starts = self.runner.first_start.values()
        assert all(start % PAGE == 0 for start in starts), "resumed where no state is kept"
        pool = self.loop._scheduler.blocks._checkpoints
        kept = dict(pool._entries)
        assert sorted([*kept.values(), *pool._free]) == list(range(pool.n_entries))
        assert set(kept) <= set(self.loop._scheduler.blocks._nodes)


@pytest.mark.parametrize("seed", range(24))
def test_any_order_of_arrivals_cancels_interrupts_and_failures(seed, monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", seed % 3)  # sequences change slots all the time
    StateWorld(seed).run()


def test_the_random_worlds_do_what_they_are_about(monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", 0)
    world = StateWorld(3)
    world.runner = StateRunner(9, 4, 64, 16, 3)
    world.loop = EngineLoop(world.runner, checkpoint_spacing=PAGE)
    world.calm = True
    for _ in range(160):
        world.submit()
    while len(world.ended) < len(world.jobs):
        world.step()
    world.step()
    world.check()
    states = world.runner.states
    assert min(states.n_restored, states.n_moved, states.n_loaded) > 3


def test_one_place_less_is_too_few():
    """The bound of the decision record is exact: with one place less a step that is cut short cannot be repeated."""
    runner = StateRunner(8, 1, 64, 16, 3, spare=-1)
    loop = EngineLoop(runner)
    stream = Stream(loop, make_job(runner, 1, [1, 2, 3], 20, by_step=False))
    next(stream)
    next(stream)

    events = iter([None, KeyboardInterrupt])

    def interrupt_after_the_launch():
        if event := next(events):
            raise event

    runner.trouble = interrupt_after_the_launch
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    runner.trouble = lambda: None
    with pytest.raises(AssertionError, match="not the one after these tokens"):
        next(stream)


def test_an_equal_prompt_resumes_at_its_last_page_border():
    runner = StateRunner(40, 4, 512, 16, 0, n_checkpoints=8)
    loop = EngineLoop(runner, checkpoint_spacing=2 * PAGE)
    prompt = [i % 50 for i in range(5 * PAGE)]

    def cached(request_id, tokens):
        result = Stream(loop, make_job(runner, request_id, tokens, 4, by_step=False)).result()
        assert result.token_ids == runner.truth[request_id].output_ids
        return result.stats.cached_tokens

    assert cached(1, prompt) == 0
    assert cached(2, prompt) == 4 * PAGE  # the last token is computed, hence its page
    assert cached(3, [*prompt, 7]) == 4 * PAGE
    assert cached(4, [*prompt, 8]) == 5 * PAGE  # request 3 left a checkpoint there
    assert cached(5, [*prompt[: 3 * PAGE], *[9] * PAGE]) == 2 * PAGE  # known up to 3 pages, but no state was kept there


def test_an_entry_that_was_not_written_is_not_used(caplog):
    runner = StateRunner(40, 4, 512, 16, 0)
    loop = EngineLoop(runner)
    prompt = [i % 50 for i in range(2 * PAGE + 1)]

    def failing():
        raise RunnerFailure("no copy")

    stream = Stream(loop, make_job(runner, 1, prompt, 4, by_step=False))
    runner.states.before = failing
    assert stream.result().token_ids == runner.truth[1].output_ids  # which needs no checkpoint itself
    assert "no copy" in caplog.text
    runner.states.before = lambda: None
    result = Stream(loop, make_job(runner, 2, prompt, 4, by_step=False)).result()
    assert result.stats.cached_tokens == 0
    assert result.token_ids == runner.truth[2].output_ids


def test_a_checkpoint_that_fails_ends_those_who_would_resume_there():
    """The copy and the request that wants it can be in the same plan."""
    runner = StateRunner(40, 4, 2 * PAGE, 2 * PAGE, 0)
    loop = EngineLoop(runner)
    prompt = [i % 50 for i in range(2 * PAGE + 1)]
    loop.submit([make_job(runner, 1, prompt, 4)])
    loop.step()  # the checkpoint is to be copied before the next step
    loop.submit([make_job(runner, 2, prompt, 4)])
    broken = iter([RunnerFailure("no copy")])

    def fail_once():
        for error in broken:
            raise error

    runner.states.before = fail_once
    ended = []
    for _ in range(20):
        try:
            loop.step()
        except RunnerFailure as error:
            ended.append(error.request_id)
    assert ended == [2]
    assert loop.n_active == 0


def make_request(request_id, prompt, max_output=1):
    return Request(request_id, list(prompt), SamplingParams(), 0, max_output)


def run(scheduler):
    work = scheduler.plan()
    scheduler.actions.clear()
    for item in work:
        scheduler.commit(item, TokenSample(7) if item.sample else None)
    return work


def test_pieces_end_at_checkpoints_and_places_count_items():
    scheduler = Scheduler(1, 40, prefill_chunk=512, checkpoints=8, checkpoint_spacing=4 * PAGE)
    scheduler.add(make_request(1, range(6 * PAGE + 10), max_output=3))
    seen = []
    while scheduler.n_running or scheduler.n_waiting:
        work = scheduler.plan()
        asked = [action for action in scheduler.actions if isinstance(action, SaveCheckpoint)]
        scheduler.actions.clear()
        for item in work:
            seen.append((item.start, len(item.token_ids), item.sequence.state_place, [a.place for a in asked]))
            scheduler.commit(item, TokenSample(7) if item.sample else None)
            if len(item.sequence.output_ids) == 3:
                scheduler.remove(1)
    assert seen == [
        (0, 4 * PAGE, 0, []),
        (4 * PAGE, 2 * PAGE, 1, [1]),
        (6 * PAGE, 10, 2, [2]),
        (6 * PAGE + 10, 1, 3, []),
        (6 * PAGE + 11, 1, 4, []),
    ]


def test_a_state_is_kept_where_prompts_part():
    """Of three prompts with a long beginning in common, the third one resumes at its end, far from regular borders."""
    scheduler = Scheduler(1, 40, prefill_chunk=1024, checkpoints=8, checkpoint_spacing=32 * PAGE)
    common, cached, pieces = list(range(5 * PAGE + 20)), [], []
    for n in (1, 2, 3):
        scheduler.add(make_request(n, [*common, *[1000 + n] * 2 * PAGE]))
        while scheduler.n_running or scheduler.n_waiting:
            for item in run(scheduler):
                pieces.append((n, item.start, len(item.token_ids)))
                if item.sample:
                    cached.append(item.sequence.cached_tokens)
                    scheduler.remove(n)
    assert cached == [0, 0, 5 * PAGE]
    last = 7 * PAGE
    assert [piece for piece in pieces if piece[0] == 1] == [(1, 0, last), (1, last, 20)]
    assert [piece for piece in pieces if piece[0] == 2] == [(2, 0, 5 * PAGE), (2, 5 * PAGE, 2 * PAGE), (2, last, 20)]
    assert [piece for piece in pieces if piece[0] == 3] == [(3, 5 * PAGE, 2 * PAGE), (3, last, 20)]


def test_without_reuse_prompts_are_not_cut():
    for options in ({"checkpoints": 0}, {"checkpoints": 4, "prefix_cache": False}, {}):
        scheduler = Scheduler(1, 40, prefill_chunk=512, checkpoint_spacing=PAGE, **options)
        scheduler.add(make_request(1, range(5 * PAGE + 3)))
        assert [len(item.token_ids) for item in run(scheduler)] == [5 * PAGE + 3]
        assert not scheduler.actions


def test_the_entry_unused_for_longest_goes_first():
    scheduler = Scheduler(1, 40, prefill_chunk=512, checkpoints=2, checkpoint_spacing=8 * PAGE)
    prompts = {name: [name] * (PAGE + 1) for name in (1, 2, 3)}

    def resumed(request_id, name):
        scheduler.add(make_request(request_id, prompts[name]))
        found = None
        while scheduler.n_waiting or scheduler.n_running:
            work = scheduler.plan()
            found = found or [action.entry for action in scheduler.actions if isinstance(action, RestoreCheckpoint)]
            scheduler.actions.clear()
            for item in work:
                scheduler.commit(item, TokenSample(7) if item.sample else None)
                if item.sample:
                    scheduler.remove(request_id)
        return bool(found)

    assert [resumed(n, name) for n, name in enumerate((1, 2, 1, 3, 1, 2))] == [False, False, True, False, True, False]


def add(pool, page):
    entry = pool.take()
    pool.add(page, entry)
    return entry


def test_entries_go_with_their_pages():
    pool = CheckpointPool(2)
    assert [add(pool, 5), add(pool, 6)] == [0, 1]
    pool.use(5)
    assert add(pool, 7) == 1  # page 6 was unused for longest
    assert pool.find(6) is None
    pool.drop(5)
    pool.drop(5)
    assert (pool.find(5), pool.n_free) == (None, 1)
    pool.drop_entry(1)
    assert (pool.find(7), pool.n_free) == (None, 2)
    assert CheckpointPool(0).take() is None


class TestDrafts:
    def decoding(self, n_pages=4, max_output=60, prompt=10):
        scheduler = Scheduler(2, n_pages, checkpoints=0)
        scheduler.add(make_request(1, range(prompt), max_output))
        run(scheduler)
        (sequence,) = scheduler.sequences()
        return scheduler, sequence

    def test_accepted_drafts_move_positions_and_places(self):
        scheduler, sequence = self.decoding()
        sequence.draft_ids = [31, 32, 33]
        (work,) = scheduler.plan()
        assert (work.token_ids, work.draft_ids, work.start) == ((7,), (31, 32, 33), 10)
        assert scheduler.plan() == [work]  # an interrupted step is planned again
        place = sequence.state_place
        scheduler.commit(work, TokenSample(40), [TokenSample(31), TokenSample(32)])
        assert sequence.output_ids == [7, 31, 32, 40]
        assert (sequence.n_cached, sequence.state_place) == (13, place + 3)
        (work,) = scheduler.plan()
        assert (work.token_ids, work.draft_ids, work.start) == ((40,), (), 13)

    def test_rejected_drafts_move_one(self):
        scheduler, sequence = self.decoding()
        sequence.draft_ids = [31]
        (work,) = scheduler.plan()
        scheduler.commit(work, TokenSample(40))
        assert (sequence.output_ids, sequence.n_cached, sequence.state_place) == ([7, 40], 11, 2)

    def test_others_than_the_drafts_cannot_be_accepted(self):
        scheduler, sequence = self.decoding()
        sequence.draft_ids = [31]
        (work,) = scheduler.plan()
        with pytest.raises(AssertionError, match="not the drafts"):
            scheduler.commit(work, TokenSample(40), [TokenSample(32)])

    def test_drafts_stay_below_the_last_position_and_on_their_pages(self):
        scheduler, sequence = self.decoding(max_output=4)
        sequence.draft_ids = [31, 32, 33, 34]
        assert scheduler.plan()[0].draft_ids == (31, 32)  # positions 11 and 12; the last token is not fed
        scheduler, sequence = self.decoding(n_pages=1, max_output=PAGE - 9, prompt=10)
        sequence.end = None
        sequence.draft_ids = list(range(100))
        assert len(scheduler.plan()[0].draft_ids) == PAGE - 11
