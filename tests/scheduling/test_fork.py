"""The child of a fork while other threads generate: it has the model to itself, and never waits for what is gone."""

import os
import sys
import threading
import time

import pytest

from engine.api.stream import Stream
from engine.errors import EngineError
from engine.scheduling.loop import EngineLoop
from tests.support.forking import in_child
from tests.support.scheduling.books import check_books
from tests.support.scheduling.cell_runner import CellRunner, make_job

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]
PROMPT = [i % 7 for i in range(100)]


def test_children_of_a_busy_process():
    runner = CellRunner(8, 3, 64, 16, 3)
    loop = EngineLoop(runner)
    done = threading.Event()

    def generate(first):
        number = first
        while not done.is_set():
            number += 1
            Stream(loop, make_job(runner, number, PROMPT[number % 9 :], 40, seed=number, by_step=False)).result()

    threads = [threading.Thread(target=generate, args=(n * 10**6,)) for n in (1, 2, 3, 4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # forks at any place of the others' calls
    for thread in threads:
        thread.start()

    def child():
        for number in (2, 3):
            result = Stream(loop, make_job(runner, number, PROMPT, 20, seed=number, by_step=False)).result()
            assert result.token_ids == runner.truth[number].output_ids
        assert loop.n_active == 0
        check_books(loop)
        loop.close()

    try:
        for _ in range(40):
            in_child(child)
            time.sleep(1e-3)
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    result = Stream(loop, make_job(runner, 1, PROMPT, 20, by_step=False)).result()
    assert result.token_ids == runner.truth[1].output_ids


def test_requests_of_the_parent_are_errors_in_the_child():
    runner = CellRunner(8, 3, 64, 16, 3)
    loop = EngineLoop(runner)
    stream = Stream(loop, make_job(runner, 1, PROMPT, 20, by_step=False))
    loop.submit([make_job(runner, 2, PROMPT, 20)])
    first = next(stream).token_ids

    def child():
        with pytest.raises(EngineError, match="forked while this request was running"):
            list(stream)
        with pytest.raises(EngineError, match="make it again in the child") as caught:
            loop.step()
        assert caught.value.request_id == 2
        assert loop.step() == []
        assert loop.n_active == 0
        check_books(loop)

    in_child(child)
    assert stream.result().token_ids == runner.truth[1].output_ids
    assert stream.result().token_ids[:1] == list(first)


def test_a_fork_inside_of_a_step():
    """As by a signal handler: parent and child both go on with the step; the child's request then has an error."""
    runner = CellRunner(8, 3, 64, 16, 3)
    loop = EngineLoop(runner)
    stream = Stream(loop, make_job(runner, 1, PROMPT, 20, by_step=False))
    pids = []

    def fork_once():
        if not pids:
            pids.append(os.fork())

    runner.trouble = fork_once
    try:
        ids = stream.result().token_ids
    except EngineError as error:
        ids = str(error)
    if pids == [0]:
        other = Stream(loop, make_job(runner, 2, PROMPT, 5, by_step=False)).result()
        good = "forked while" in ids and other.token_ids == runner.truth[2].output_ids and loop.n_active == 0
        os._exit(0 if good else 1)
    assert ids == runner.truth[1].output_ids
    assert os.waitpid(pids[0], 0)[1] == 0
