"""Ctrl-C at any point of the engine's own code, after which the same model goes on as if nothing had been.

A profile hook sends the signal at the k-th call or return of a built-in, where Python itself looks for signals.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import engine
from engine.api.stream import Stream
from engine.scheduling.interrupts import deferral
from engine.scheduling.loop import EngineLoop
from tests.scheduling.test_paged_loop import CellRunner, make_job

CODE = tuple(
    str(Path(engine.__file__).parent / name)
    for name in (
        *(f"scheduling/{part}.py" for part in ("loop", "scheduler", "page_pool", "output", "interrupts")),
        "api/stream.py",
    )
)
PROMPT = [i % 7 for i in range(100)]
PROMPTS = [(PROMPT, 20, 0), ([*PROMPT[:80], 9], 12, 1), (PROMPT, 3, 2)]


class Interruption:
    """Sends SIGINT to this thread at event number `at` inside the engine's code."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, argument):
        if event in ("call", "c_return") and frame.f_code.co_filename in CODE:
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)

    def during(self, action):
        """Whether the action came to its end, and what it returned."""
        sys.setprofile(self)
        try:
            value = action()
            sys.setprofile(None)
            return True, value
        except KeyboardInterrupt:
            return False, None
        finally:
            sys.setprofile(None)


def make_loop():
    """So few pages that somebody is preempted; prompts in pieces; shared beginnings."""
    runner = CellRunner(5, 3, 64, 16, 3)
    return runner, EngineLoop(runner)


def nothing_is_held(runner, loop):
    assert loop.n_active == 0
    assert not runner.live
    blocks = loop._scheduler.blocks
    assert blocks.n_available == blocks.n_pages
    assert sorted(loop._scheduler._free_slots) == [0, 1, 2]
    assert not deferral._outer
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def run_steps(at):
    """Three requests by step(); returns how many events there were."""
    runner, loop = make_loop()
    interruption = Interruption(at)
    jobs = [make_job(runner, i, prompt, n, seed=seed) for i, (prompt, n, seed) in enumerate(PROMPTS)]
    loop.submit(jobs)
    chunks = [[], [], []]
    for _ in range(200):
        _, given = interruption.during(loop.step)
        for chunk in given or ():
            chunks[chunk.request_id].append(chunk)
        if all(given and given[-1].finish_reason for given in chunks):
            break
    loop.step()
    assert runner.n_saved > 0
    for i, given in enumerate(chunks):
        assert [token for chunk in given for token in chunk.token_ids] == runner.truth[i].output_ids
    nothing_is_held(runner, loop)
    return interruption.seen


def run_streams(at):
    """The same by streams: one read to its end, the second closed early, the third read to its end."""
    runner, loop = make_loop()
    interruption = Interruption(at)
    jobs = [make_job(runner, i, prompt, n, seed=seed, by_step=False) for i, (prompt, n, seed) in enumerate(PROMPTS)]
    streams = [Stream(loop, job) for job in jobs]

    def whole(stream):
        over = False
        while not over:
            over, result = interruption.during(stream.result)
        return result

    assert whole(streams[0]).token_ids == runner.truth[0].output_ids
    closed = False
    while not closed:
        closed, _ = interruption.during(streams[1].close)
    assert whole(streams[2]).token_ids == runner.truth[2].output_ids
    ids = whole(streams[1]).token_ids
    assert ids == runner.truth[1].output_ids[: len(ids)]
    loop.step()
    nothing_is_held(runner, loop)
    return interruption.seen


@pytest.mark.parametrize("run", [run_steps, run_streams])
def test_an_interrupt_anywhere_leaves_the_books_whole(run):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        n_events = run(0)
        assert n_events > 1000
        for at in [*range(1, 60), *range(60, n_events, 13)]:
            run(at)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_the_programs_own_is_called_once_and_kept():
    calls = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    own = signal.getsignal(signal.SIGINT)
    try:
        with deferral, deferral:
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT]
        with deferral:
            try:
                deferral.lifted = True
                signal.raise_signal(signal.SIGINT)
            finally:
                deferral.lifted = False
            assert len(calls) == 2
        assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with deferral:
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_touch_no_handler():
    seen = []

    def work():
        with deferral:
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_step_on_another_thread_lets_nothing_through_on_this_one():
    runner, loop = make_loop()
    stream = Stream(loop, make_job(runner, 1, [1, 2, 3], 1, by_step=False))
    inside, go_on = threading.Event(), threading.Event()
    step = runner.step

    def slow_step(work):
        inside.set()
        go_on.wait(30)
        return step(work)

    runner.step = slow_step
    thread = threading.Thread(target=stream.result)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    inside.wait(30)
    reached = interrupted = False
    try:
        with deferral:
            signal.raise_signal(signal.SIGINT)
            reached = True
    except KeyboardInterrupt:
        interrupted = True
    finally:
        go_on.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert reached
    assert interrupted
    assert stream.result().token_ids == runner.truth[1].output_ids


def test_who_waits_for_another_threads_step_can_be_interrupted():
    runner, loop = make_loop()
    stream = Stream(loop, make_job(runner, 1, [1, 2, 3], 50, by_step=False))
    started, go_on = threading.Event(), threading.Event()

    def hold():
        with loop.exclusive():
            started.set()
            go_on.wait(30)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=hold)
    thread.start()
    started.wait(30)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        go_on.set()
        thread.join()
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert stream.result().token_ids == runner.truth[1].output_ids
