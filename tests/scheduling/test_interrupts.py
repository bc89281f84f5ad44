"""Real signals and exceptions raised from other threads, and how the loop tells them from failures of a step."""

import ctypes
import functools
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from engine.api.stream import Stream
from engine.errors import EngineError
from engine.scheduling.loop import EngineLoop
from tests.support.injection import within, without_collector_callbacks
from tests.support.scheduling.cell_runner import CellRunner, RunnerFailure, make_job

PROMPT = [i % 7 for i in range(100)]


class Alarm(Exception):
    """Raised by the handler of SIGALRM."""


def ring(number, frame):
    raise Alarm


@pytest.fixture
def alarm():
    """SIGALRM raises an ordinary exception, as test timeouts do; gives the function that sets the time."""
    before = signal.signal(signal.SIGALRM, ring)
    with without_collector_callbacks():
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def make_loop(slow=0.0):
    """So few pages that sequences are preempted; steps take `slow` seconds, in pieces."""
    runner = CellRunner(8, 4, 64, 16, 3)
    runner.trouble = lambda: time.sleep(slow) if slow else None
    return runner, EngineLoop(runner)


def nothing_is_held(runner, loop):
    loop.step()
    assert loop.n_active == 0
    assert not runner.live
    blocks = loop._scheduler.blocks
    assert blocks.n_available == blocks.n_pages
    assert sorted(loop._scheduler._slots.free) == [0, 1, 2, 3]


def raise_in(thread, kind):
    """What debuggers and some test runners do to a thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(kind))


def test_a_signal_handler_that_raises_while_another_thread_generates(alarm):
    """The main thread is thrown out of its calls again and again; both threads get their own tokens."""
    runner, loop = make_loop(slow=1e-5)
    dice = random.Random(3)
    done, failures = threading.Event(), []

    def generate():
        request_id = 10_000
        while not done.is_set():
            request_id += 1
            stream = Stream(loop, make_job(runner, request_id, PROMPT, 20, seed=request_id, by_step=False))
            if stream.result().token_ids != runner.truth[request_id].output_ids:
                failures.append(request_id)

    thread = threading.Thread(target=generate)
    thread.start()
    n_alarms = 0
    try:
        for request_id in range(60):
            job = make_job(runner, request_id, PROMPT[request_id % 5 :], 30, seed=request_id, by_step=False)
            stream, got, over = Stream(loop, job), [], False
            while not over:
                try:
                    alarm(dice.uniform(0.0001, 0.004))
                    for chunk in stream:
                        got += chunk.token_ids
                    over = True
                    alarm(0)
                except Alarm:
                    n_alarms += 1
            assert stream.result().token_ids == runner.truth[request_id].output_ids
            # A chunk that was on its way from next() to this loop when the alarm rang is in the result alone.
            rest = iter(stream.result().token_ids)
            assert all(token in rest for token in got)
            assert len(stream.result().token_ids) - len(got) <= n_alarms
    finally:
        alarm(0)
        done.set()
        thread.join(30)
    assert not thread.is_alive(), "the other thread waits for ever"
    assert failures == []
    assert n_alarms > 20
    nothing_is_held(runner, loop)


def test_exceptions_raised_into_two_threads_by_a_third():
    runner, loop = make_loop(slow=1e-5)
    failures, hits, finished = [], [], []

    def generate(first, left):
        while left:
            request_id = left.pop()
            stream = Stream(loop, make_job(runner, request_id, PROMPT, 25, seed=request_id, by_step=False))
            while True:
                try:
                    ids = stream.result().token_ids
                    break
                except Alarm:
                    hits.append(first)
            if ids != runner.truth[request_id].output_ids:
                failures.append(request_id)
            finished.append(request_id)

    def run(first):
        left = list(range(first, first + 25))
        try:
            while left:
                with suppress(Alarm):  # between two requests
                    generate(first, left)
        except Alarm:
            hits.append(first)  # where the one before was handled: the thread ends
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(first,), daemon=True) for first in (0, 1000)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    dice = random.Random(1)
    while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
        raise_in(dice.choice(threads), Alarm)
        time.sleep(dice.uniform(0.001, 0.004))
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    assert failures == []
    assert hits
    assert len(finished) >= 10, "most requests were never followed to their end"
    del threads
    result = within(30, lambda: Stream(loop, make_job(runner, 1, PROMPT, 9, by_step=False)).result())
    assert result.token_ids == runner.truth[1].output_ids
    nothing_is_held(runner, loop)


def test_ctrl_c_at_every_call_of_a_built_in_function():
    """Where Python itself looks for signals; a profile hook sends them."""
    runner, loop = make_loop()
    stream, seen = Stream(loop, make_job(runner, 1, PROMPT, 60, by_step=False)), [0]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ids, n_hits, at = [], 0, 0

    def hook(frame, event, argument):
        if event == "c_return" and "/engine/" in frame.f_code.co_filename:
            seen[0] += 1
            if seen[0] == at:
                signal.raise_signal(signal.SIGINT)

    try:
        while stream._n == 0 or stream._job.chunks[stream._n - 1].finish_reason is None:
            at, seen[0] = at + 1, 0
            try:
                sys.setprofile(hook)
                chunk = next(stream)
                sys.setprofile(None)
                ids += chunk.token_ids
            except KeyboardInterrupt:
                n_hits += 1
            finally:
                sys.setprofile(None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert n_hits > 30
    assert ids == stream.result().token_ids == runner.truth[1].output_ids
    nothing_is_held(runner, loop)


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


def test_the_model_used_by_a_handler_inside_a_step_is_an_error_and_no_deadlock(alarm):
    runner, loop = make_loop()
    stream = Stream(loop, make_job(runner, 1, [1, 2, 3], 5, by_step=False))
    inner = Stream(loop, make_job(runner, 2, [1, 2], 5, by_step=False))
    signal.signal(signal.SIGALRM, lambda *_: inner.result())
    runner.trouble = lambda: signal.raise_signal(signal.SIGALRM)
    with pytest.raises(EngineError, match="inside one of its own steps"):
        next(stream)
    runner.trouble = lambda: None
    assert stream.result().token_ids == runner.truth[1].output_ids
    assert inner.result().token_ids == runner.truth[2].output_ids


class Handler:
    """Handlers are functions, methods, partial functions or objects."""

    def __call__(self, number, frame):
        raise ValueError("time is over")

    def method(self, number, frame):
        raise ValueError("time is over")


@pytest.mark.parametrize("handler", [Handler(), Handler().method, functools.partial(Handler().method)])
def test_what_a_handler_raises_ends_no_request(handler, alarm):
    """However often, of whatever class."""
    runner, loop = make_loop()
    streams = [Stream(loop, make_job(runner, n, [1, 2, n], 5, by_step=False)) for n in (1, 2)]
    signal.signal(signal.SIGALRM, handler)
    runner.trouble = lambda: signal.raise_signal(signal.SIGALRM)
    for _ in range(5):
        with pytest.raises(ValueError, match="time is over"):
            next(streams[0])
    runner.trouble = lambda: None
    for n in (1, 2):
        assert streams[n - 1].result().token_ids == runner.truth[n].output_ids


def test_a_fault_that_repeats_is_a_failure_of_the_step():
    """The first time it could have come from outside; it would not come again at the same instruction."""
    runner, loop = make_loop()
    streams = [Stream(loop, make_job(runner, n, [1, 2, n], 5, by_step=False)) for n in (1, 2)]

    def fault():
        raise ZeroDivisionError

    runner.trouble = fault
    with pytest.raises(ZeroDivisionError):
        next(streams[0])
    assert loop.n_active == 2
    for stream in streams:
        with pytest.raises(ZeroDivisionError):
            stream.result()
    assert loop.n_active == 0
    runner.trouble = lambda: None
    assert Stream(loop, make_job(runner, 3, [1], 2, by_step=False)).result().token_ids == runner.truth[3].output_ids


def test_an_engine_error_is_a_failure_at_once_and_each_request_has_its_own():
    runner, loop = make_loop()
    jobs = [make_job(runner, n, [1, 2, n], 5) for n in (1, 2)]
    loop.submit(jobs)

    def fail():
        raise RunnerFailure("made to fail")

    runner.trouble = fail
    told = []
    for _ in jobs:
        with pytest.raises(RunnerFailure) as caught:
            loop.step()
        told.append(caught.value.request_id)
    assert told == [1, 2]
    assert jobs[0].error is not jobs[1].error


class TestClosing:
    def test_closing_that_is_cut_short_can_be_repeated(self):
        runner, loop = make_loop()
        stream = Stream(loop, make_job(runner, 1, [1, 2, 3], 50, by_step=False))
        next(stream)
        closes = []

        def close():
            closes.append(1)
            if len(closes) < 3:
                raise KeyboardInterrupt

        runner.close = close
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                loop.close()
            with pytest.raises(EngineError, match="closed"):
                loop.step()
        loop.close()
        loop.close()
        assert len(closes) == 3
        with pytest.raises(EngineError, match="closed while"):
            stream.result()
