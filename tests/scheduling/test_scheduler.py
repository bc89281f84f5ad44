"""The scheduler alone: integers in, integers out."""

import random
from collections import Counter

import pytest

from engine.config import PAGE
from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.actions import LeaveSlot
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.slots import PATIENCE

PARAMS = SamplingParams()


def make_request(request_id, length, max_output=4, score_from=None):
    return Request(request_id, list(range(100, 100 + length)), PARAMS, 0, max_output, score_from)


def make_scheduler(max_sequences, *, n_pages=1000, chunk=512, mixed=None, **options):
    return Scheduler(max_sequences, n_pages, prefill_chunk=chunk, mixed_chunk=mixed or chunk, **options)


def run_step(scheduler):
    """Plan, pretend to compute, commit; returns the plan."""
    work = scheduler.plan()
    scheduler.actions.clear()
    for item in work:
        scheduler.commit(item, TokenSample(7) if item.sample else None)
    return work


def test_nothing_to_do():
    assert make_scheduler(2).plan() == []


def test_prompt_then_tokens():
    scheduler = make_scheduler(1)
    scheduler.add(make_request(1, 3))
    (first,) = run_step(scheduler)
    assert (list(first.token_ids), first.start, first.sample) == ([100, 101, 102], 0, True)
    (second,) = run_step(scheduler)
    assert (list(second.token_ids), second.start, second.sample) == ([7], 3, True)
    assert scheduler.plan()[0].start == 4


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31, 33])
def test_chunks_end_at_multiples_and_only_the_last_samples(length):
    scheduler = make_scheduler(1, chunk=8)
    scheduler.add(make_request(1, length))
    fed = []
    while True:
        (work,) = run_step(scheduler)
        fed += work.token_ids
        assert work.start % 8 == 0
        assert work.sample == (len(fed) == length)
        if work.sample:
            break
    assert fed == list(range(100, 100 + length))


def test_a_plan_that_is_not_committed_is_made_again():
    scheduler = make_scheduler(2, chunk=8)
    scheduler.add(make_request(1, 20))
    assert scheduler.plan() == scheduler.plan()


def test_short_prompts_share_a_step_in_order_of_arrival():
    scheduler = make_scheduler(4, chunk=8, mixed=6)
    for request_id, length in ((1, 5), (2, 6), (3, 4)):
        scheduler.add(make_request(request_id, length))
    fed = [[(work.sequence.request_id, len(work.token_ids)) for work in run_step(scheduler)] for _ in range(3)]
    assert fed[0] == [(1, 5), (2, 3)]  # 3 waits: the budget is used up by those before it
    assert fed[1] == [(1, 1), (2, 3), (3, 3)]  # a sequence decodes: the smaller budget
    assert fed[2] == [(1, 1), (2, 1), (3, 1)]


def test_a_long_prompt_does_not_stop_running_sequences():
    scheduler = make_scheduler(2, chunk=8, prefix_cache=False)
    scheduler.add(make_request(1, 2, max_output=100))
    run_step(scheduler)
    scheduler.add(make_request(2, 80))
    for _ in range(10):
        work = run_step(scheduler)
        assert [item.sequence.request_id for item in work] == [1, 2]
        assert [len(item.token_ids) for item in work] == [1, 8]


def test_what_only_is_scored_takes_no_page_more_than_it_fills():
    scheduler = make_scheduler(4, n_pages=4)
    for request_id in range(4):
        scheduler.add(make_request(request_id, PAGE, max_output=request_id // 2, score_from=1))
    assert len(scheduler.plan()) == 4


def test_scored_parts_of_a_prompt():
    scheduler = make_scheduler(1, chunk=8)
    scheduler.add(make_request(1, 20, score_from=5))
    work = [run_step(scheduler)[0] for _ in range(4)]
    assert [(item.start, len(item.token_ids), item.score) for item in work] == [
        (0, 4, False),
        (4, 8, True),
        (12, 7, True),
        (19, 1, False),
    ]
    assert [item.sample for item in work] == [False, False, False, True]


def test_scoring_alone_feeds_all_but_the_last_token():
    scheduler = make_scheduler(1, chunk=8)
    scheduler.add(make_request(1, 10, max_output=0, score_from=1))
    fed = []
    while not scheduler.n_running or not scheduler.is_scored(1):
        (work,) = run_step(scheduler)
        assert work.score
        assert not work.sample
        fed += work.token_ids
    assert fed == list(range(100, 109))
    assert scheduler.plan() == []


def test_removed_while_waiting_and_unknown():
    scheduler = make_scheduler(1)
    scheduler.add(make_request(1, 2))
    scheduler.add(make_request(2, 2))
    scheduler.plan()
    assert scheduler.remove(2) is None
    assert scheduler.n_waiting == 0
    assert scheduler.remove(99) is None
    assert scheduler.remove(1) == 0
    assert scheduler.n_running == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_arrivals_and_cancels(seed):
    """Against what must hold: unique slots, order of arrival, every token fed once and in order, every request ends.

    What pages hold is the business of test_paged_loop.py.
    """
    rng = random.Random(seed)
    slots, chunk = rng.randint(1, 5), rng.choice([1, 3, 16])
    options = {"prefix_cache": rng.random() < 0.7, "lookahead": rng.choice([0, 4])}
    scheduler = make_scheduler(slots, chunk=chunk, n_pages=rng.choice([3, 5, 1000]), **options)
    requests, fed, started, finished = {}, {}, [], set()
    next_id = 1
    for step in range(20_000):
        if step < 300 and rng.random() < 0.4:
            score_from = rng.choice([None, None, 1, 3])
            length = rng.choice([rng.randint(4, 40), rng.randint(4, 180)])
            requests[next_id] = make_request(next_id, length, max_output=rng.randint(1, 9), score_from=score_from)
            scheduler.add(requests[next_id])
            next_id += 1
        if requests and rng.random() < 0.05:
            victim = rng.choice(sorted(requests))
            if victim not in finished:
                scheduler.remove(victim)
                finished.add(victim)
        work = run_step(scheduler)
        used = Counter(item.sequence.slot for item in work)
        assert all(count == 1 and 0 <= slot < slots for slot, count in used.items())
        assert scheduler.n_running <= slots
        assert sum(len(item.token_ids) for item in work if item.start < len(item.sequence.prompt_ids)) <= chunk
        for item in work:
            request_id = item.sequence.request_id
            assert request_id not in finished
            assert item.sequence.end == len(item.sequence.prompt_ids) + requests[request_id].max_output - 1
            assert (len(item.sequence.pages) - 1) * PAGE < item.sequence.end, "a page that nothing will be in"
            if request_id not in fed:
                started.append(request_id)
                fed[request_id] = item.sequence.prompt_ids[: item.sequence.cached_tokens]
            assert item.start == len(fed[request_id])
            fed[request_id] += item.token_ids
            if len(item.sequence.output_ids) == requests[request_id].max_output:
                expected = requests[request_id].prompt_ids + [7] * (requests[request_id].max_output - 1)
                assert fed[request_id] == expected
                assert scheduler.remove(request_id) == item.sequence.slot
                finished.add(request_id)
        if step >= 300 and not work and not scheduler.n_running:
            break
    assert started == sorted(started)
    assert finished == set(requests)
    assert (scheduler.n_running, scheduler.n_waiting, scheduler.n_preempted) == (0, 0, 0)
    scheduler.plan()
    assert scheduler.blocks.n_available == scheduler.blocks.n_pages


def test_the_youngest_gives_way_and_goes_on_before_anybody_new():
    scheduler = make_scheduler(3, n_pages=4, prefix_cache=False)
    for request_id in (1, 2, 3):
        scheduler.add(make_request(request_id, 60, max_output=80))
    run_step(scheduler)
    assert (scheduler.n_running, scheduler.n_waiting) == (3, 0)
    while not scheduler.n_preempted:
        run_step(scheduler)
    assert [sequence.request_id for sequence in scheduler.sequences()] == [1, 2]
    scheduler.add(make_request(4, 3))
    scheduler.remove(1)
    work = run_step(scheduler)
    assert [item.sequence.request_id for item in work] == [2, 3]
    assert scheduler.n_waiting + scheduler.n_preempted == 1  # 4 has no page yet
    assert work[1].decode
    assert work[1].start == len(work[1].sequence.prompt_ids) + len(work[1].sequence.output_ids) - 2


def test_samples_of_a_prompt_share_its_pages():
    scheduler = make_scheduler(4, n_pages=8)
    prompt = make_request(1, 4 * PAGE + 10).prompt_ids
    for request_id in (1, 2, 3, 4):
        shares_with = None if request_id == 1 else 1
        scheduler.add(Request(request_id, prompt, PARAMS, request_id, 4, shares_with=shares_with))
    assert [item.sequence.request_id for item in run_step(scheduler)] == [1]
    work = run_step(scheduler)
    assert [(item.sequence.request_id, len(item.token_ids)) for item in work] == [(1, 1), (2, 1), (3, 1), (4, 1)]
    held = [sequence.pages for sequence in scheduler.sequences()]
    assert len({tuple(pages[:4]) for pages in held}) == 1
    assert len({pages[4] for pages in held}) == 4
    assert scheduler.blocks.n_available == 0
    assert [scheduler.blocks.holders(page) for page in held[0][:4]] == [4] * 4


def test_samples_that_cannot_share_do_not_wait_for_one_another():
    scheduler = make_scheduler(3, prefix_cache=False)
    for request_id in (1, 2, 3):
        shares_with = None if request_id == 1 else 1
        scheduler.add(Request(request_id, [5, 6, 7], PARAMS, request_id, 4, shares_with=shares_with))
    assert [item.sequence.request_id for item in run_step(scheduler)] == [1, 2, 3]


def test_those_who_stay_close_ranks():
    """Sequences left in high slots move down, together and not at once; none moves without need."""
    scheduler = make_scheduler(16, lookahead=4)
    for request_id in range(9):
        scheduler.add(make_request(request_id, 3, max_output=200))
    run_step(scheduler)
    assert [sequence.slot for sequence in scheduler.sequences()] == list(range(9))
    for request_id in (0, 1, 3, 5, 6):
        scheduler.remove(request_id)
    for _ in range(PATIENCE):
        work = scheduler.plan()
        assert {item.sequence.slot for item in work} == {2, 4, 7, 8}
        assert not scheduler.actions
        for item in work:
            scheduler.commit(item, TokenSample(7))
    work = scheduler.plan()
    left = list(scheduler.actions)
    scheduler.actions.clear()
    assert left == [LeaveSlot(4, 4, 0), LeaveSlot(7, 7, 1), LeaveSlot(8, 8, 3)]
    assert [sequence.slot for sequence in scheduler.sequences()] == [2, 0, 1, 3]
    assert [item.start for item in work] == [3 + PATIENCE] * 4
    scheduler.add(make_request(20, 3, max_output=200))  # the slots that were left serve others
    run_step(scheduler)
    assert sorted(sequence.slot for sequence in scheduler.sequences()) == [0, 1, 2, 3, 4]
    for _ in range(3 * PATIENCE):
        assert not scheduler.plan() or not scheduler.actions
        run_step(scheduler)
