"""The thread pool under asynchronous exceptions: no task runs on when run() is over, and no later run() suffers."""

import threading
import time
from itertools import count

import pytest

from engine.cpu.threads import ThreadPool, _Job
from tests.support.injection import Injected, Injection, engine_files

FILES = engine_files("cpu/threads.py", "concurrency/turn.py")
N_TASKS = 6


class Tasks:
    """Tasks that take a moment, and say which of them are running."""

    def __init__(self):
        self.done, self.running = [], []

    def __call__(self, index):
        self.running.append(index)
        time.sleep(0.0005)
        self.done.append(index)
        self.running.remove(index)


def check_still_works(pool):
    tasks = Tasks()
    pool.run(tasks, N_TASKS)
    assert sorted(tasks.done) == list(range(N_TASKS))


def interrupted_run(at, *, opcodes):
    """One run cut short at event `at`, with the pool's threads started before or not; returns the number of events."""
    with ThreadPool(3) as pool:
        if at % 2:
            pool.run(Tasks(), N_TASKS)
        tasks, injection = Tasks(), Injection(at, FILES, opcodes=opcodes)
        over, _ = injection.during(lambda: pool.run(tasks, N_TASKS))
        assert tasks.running == [], injection.where
        done = sorted(tasks.done)
        assert len(set(done)) == len(done)
        if over:
            assert done == list(range(N_TASKS)), injection.where
        time.sleep(0.001)
        assert sorted(tasks.done) == done, injection.where
        check_still_works(pool)
    return injection.seen


@pytest.mark.parametrize("opcodes", [False, True])
def test_an_exception_at_any_place_leaves_no_task_running(opcodes):
    n_events = max(interrupted_run(0, opcodes=opcodes), interrupted_run(-1, opcodes=opcodes))
    assert n_events > 40
    for at in range(1, n_events + 20, 9 if opcodes else 1):
        interrupted_run(at, opcodes=opcodes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_in_a_helper_is_told_or_harmless():
    """Raised into a thread of the pool; the caller gets an error or everything was done, and never waits for ever."""
    outcomes = set()
    for at in range(1, 40):
        injection = Injection(at, FILES)
        threading.settrace(injection)
        pool = ThreadPool(2)
        tasks = Tasks()
        try:
            pool.run(tasks, N_TASKS)
            assert sorted(tasks.done) == list(range(N_TASKS)), injection.where
            outcomes.add("done")
        except (Injected, RuntimeError):
            outcomes.add("told")
        finally:
            threading.settrace(None)
        assert tasks.running == [], injection.where
        check_still_works(pool)
        pool.close()
    assert outcomes == {"done", "told"}


def test_settle_waits_for_what_many_exceptions_left(monkeypatch):
    """A timer that raises every millisecond makes run() give up waiting; the next step waits instead."""
    inside, go_on, calls = threading.Event(), threading.Event(), count()
    caller, finish = threading.current_thread(), _Job.finish

    def task(index):
        if threading.current_thread() is caller:
            inside.wait(10)  # so that a thread of the pool has the other one
        else:
            inside.set()
            go_on.wait(10)

    def cut_short(job):
        inside.wait(10)
        if next(calls) < 2:
            raise Injected
        finish(job)

    monkeypatch.setattr(_Job, "finish", cut_short)
    with ThreadPool(2) as pool:
        with pytest.raises(Injected):
            pool.run(task, 2)
        assert next(calls) == 2
        assert len(pool._open) == 1
        timer = threading.Timer(0.05, go_on.set)
        timer.start()
        pool.settle()
        assert go_on.is_set()
        assert pool._open == []
        check_still_works(pool)
