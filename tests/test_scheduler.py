"""The scheduler alone: integers in, integers out."""

import random
from collections import Counter

import pytest

from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduler import Scheduler

PARAMS = SamplingParams()


def make_request(request_id, length, max_output=4, score_from=None):
    return Request(request_id, list(range(100, 100 + length)), PARAMS, 0, max_output, score_from)


def run_step(scheduler):
    """Plan, pretend to compute, commit; returns the plan."""
    work = scheduler.plan()
    for item in work:
        scheduler.commit(item, TokenSample(7) if item.sample else None)
    return work


def test_nothing_to_do():
    assert Scheduler(2).plan() == []


def test_prompt_then_tokens():
    scheduler = Scheduler(1)
    scheduler.add(make_request(1, 3))
    (first,) = run_step(scheduler)
    assert (list(first.token_ids), first.start, first.sample) == ([100, 101, 102], 0, True)
    (second,) = run_step(scheduler)
    assert (list(second.token_ids), second.start, second.sample) == ([7], 3, True)
    assert scheduler.plan()[0].start == 4


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31, 33])
def test_chunks_end_at_multiples_and_only_the_last_samples(length):
    scheduler = Scheduler(1, prefill_chunk=8)
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
    scheduler = Scheduler(2, prefill_chunk=8)
    scheduler.add(make_request(1, 20))
    assert scheduler.plan() == scheduler.plan()


def test_budget_keeps_arrival_order():
    scheduler = Scheduler(4, prefill_chunk=8)
    for request_id, length in ((1, 5), (2, 6), (3, 2)):
        scheduler.add(make_request(request_id, length))
    assert [work.sequence.request_id for work in run_step(scheduler)] == [1]  # 5 + 6 > 8, and 3 must not overtake 2
    second = run_step(scheduler)
    assert [(work.sequence.request_id, len(work.token_ids)) for work in second] == [(1, 1), (2, 6), (3, 2)]


def test_a_long_prompt_does_not_stop_running_sequences():
    scheduler = Scheduler(2, prefill_chunk=8)
    scheduler.add(make_request(1, 2, max_output=100))
    run_step(scheduler)
    scheduler.add(make_request(2, 80))
    for _ in range(10):
        work = run_step(scheduler)
        assert [item.sequence.request_id for item in work] == [1, 2]
        assert [len(item.token_ids) for item in work] == [1, 8]


def test_scored_parts_of_a_prompt():
    scheduler = Scheduler(1, prefill_chunk=8)
    scheduler.add(make_request(1, 20, score_from=5))
    work = [run_step(scheduler)[0] for _ in range(5)]
    assert [(item.start, len(item.token_ids), item.score) for item in work] == [
        (0, 4, False),
        (4, 4, True),
        (8, 8, True),
        (16, 3, True),
        (19, 1, False),
    ]
    assert [item.sample for item in work] == [False, False, False, False, True]


def test_scoring_alone_feeds_all_but_the_last_token():
    scheduler = Scheduler(1, prefill_chunk=8)
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
    scheduler = Scheduler(1)
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
    """Against what must hold: unique slots, order of arrival, every token fed once and in order, every request ends."""
    rng = random.Random(seed)
    slots, chunk = rng.randint(1, 5), rng.choice([1, 3, 16])
    scheduler = Scheduler(slots, prefill_chunk=chunk)
    requests, fed, started, finished = {}, {}, [], set()
    next_id = 1
    for step in range(3000):
        if step < 300 and rng.random() < 0.4:
            score_from = rng.choice([None, None, 1, 3])
            length = rng.randint(4, 40)
            requests[next_id] = make_request(next_id, length, max_output=rng.randint(1, 9), score_from=score_from)
            fed[next_id] = []
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
            assert item.start == len(fed[request_id])
            if item.start == 0:
                started.append(request_id)
            fed[request_id] += item.token_ids
            if len(item.sequence.output_ids) == requests[request_id].max_output:
                expected = requests[request_id].prompt_ids + [7] * (requests[request_id].max_output - 1)
                assert fed[request_id] == expected
                assert scheduler.remove(request_id) == item.sequence.slot
                finished.add(request_id)
        if step >= 300 and not work:
            break
    assert started == sorted(started)
    assert finished == set(requests)
    assert (scheduler.n_running, scheduler.n_waiting) == (0, 0)
