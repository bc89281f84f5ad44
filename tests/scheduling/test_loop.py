"""The step loop and its streams on a runner that only counts: ends, errors, and many threads at once."""

import random
import sys
import threading
import time
from contextlib import suppress
from itertools import count

import pytest

from engine.api.stream import Stream
from engine.errors import EngineError, InvalidRequestError
from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.job import Job
from engine.scheduling.loop import EngineLoop
from engine.scheduling.output import OutputAssembler


class CountingRunner:
    """Draws prompt[0], prompt[0] + 1, ...; refuses to draw for prompts that begin with a number in `refused`."""

    def __init__(self, max_sequences=3):
        self.max_sequences, self.n_pages, self.lookahead = max_sequences, 10_000, 0
        self.prefill_chunk = self.mixed_chunk = 16
        self.mixed_per_sequence, self.known_room = 0, None
        self.refused = set()
        self.states = None
        self.held = {}
        self.steps = 0

    def step(self, work):
        self.steps += 1
        samples = []
        for item in work:
            sequence = item.sequence
            assert self.held.setdefault(sequence.slot, sequence.request_id) == sequence.request_id, "a slot used twice"
            if sequence.prompt_ids[0] in self.refused:
                samples.append(InvalidRequestError(f"refused {sequence.prompt_ids[0]}"))
            else:
                drawn = TokenSample(sequence.prompt_ids[0] + len(sequence.output_ids))
                samples.append(drawn if item.sample else None)
        return samples

    def release(self, slot):
        self.held.pop(slot, None)  # a sequence may leave before its first step

    def copy_pages(self, pairs):
        assert all(source != target for source, target in pairs)

    def close(self):
        pass


@pytest.fixture
def runner():
    return CountingRunner()


@pytest.fixture
def loop(runner):
    return EngineLoop(runner)


@pytest.fixture
def make(loop):
    ids = count(1)

    def job(prompt, n, by_step=False):
        request = Request(next(ids), prompt, SamplingParams(max_tokens=n), 0, n)
        return Job(request, OutputAssembler(request, None, ()), by_step)

    return job


class TestEnds:
    def test_result_after_close_is_what_there_was(self, loop, make):
        stream = Stream(loop, make([10], 50))
        for _ in range(3):
            next(stream)
        stream.close()
        result = stream.result()
        assert (result.token_ids, result.finish_reason) == ([10, 11, 12], "cancelled")
        assert result.stats.output_tokens == 3
        assert list(stream) == []
        assert loop.n_active == 0

    def test_result_after_close_before_the_first_step(self, loop, make):
        stream = Stream(loop, make([10], 50))
        stream.close()
        assert (stream.result().token_ids, stream.result().finish_reason) == ([], "cancelled")

    def test_close_after_the_end_changes_nothing(self, loop, make):
        with Stream(loop, make([10], 4)) as stream:
            assert stream.result().finish_reason == "length"
        assert stream.result().finish_reason == "length"

    def test_close_after_a_failure_keeps_the_failure(self, loop, runner, make):
        runner.refused.add(5)
        stream = Stream(loop, make([5], 4))
        with pytest.raises(InvalidRequestError, match="refused 5"):
            next(stream)
        stream.close()
        with pytest.raises(InvalidRequestError, match="refused 5"):
            stream.result()

    def test_closed_by_another_thread_between_two_chunks(self, loop, make):
        """The reader has looked whether the stream is over, then the stream is closed, then the reader asks on."""
        stream = Stream(loop, make([10], 50))
        next(stream)
        wait_for = loop.wait_for

        def close_first(job, n):
            loop.wait_for = wait_for
            closer = threading.Thread(target=stream.close)
            closer.start()
            closer.join()
            return wait_for(job, n)

        loop.wait_for = close_first
        assert list(stream) == []
        assert stream.result().finish_reason == "cancelled"

    def test_two_readers_of_one_stream(self, loop, make):
        stream, seen = Stream(loop, make([0], 200)), []

        def read():
            seen.extend(chunk.token_ids[0] for chunk in stream)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(30)
        assert sorted(seen) == list(range(200))


class TestErrorsByStep:
    def run(self, loop, until=200):
        """All chunks and all errors that step() gives until nothing is left."""
        chunks, errors = [], []
        for _ in range(until):
            try:
                new = loop.step()
            except EngineError as error:
                errors.append((error.request_id, str(error)))
            else:
                chunks += new
                if not new and not loop.n_active:
                    break
        return chunks, errors

    def test_two_failures_in_one_step_are_both_told(self, loop, runner, make):
        runner.refused.update((5, 6))
        loop.submit([make([5], 4, by_step=True), make([6], 4, by_step=True)])
        chunks, errors = self.run(loop)
        assert chunks == []
        assert errors == [(1, "refused 5"), (2, "refused 6")]

    def test_a_failure_does_not_wait_for_its_neighbours(self, loop, runner, make):
        runner.refused.add(5)
        loop.submit([make([5], 4, by_step=True), make([20], 100, by_step=True)])
        assert [chunk.request_id for chunk in loop.step()] == [2]
        with pytest.raises(InvalidRequestError, match="refused 5"):
            loop.step()
        chunks, errors = self.run(loop)
        assert [chunk.token_ids[0] for chunk in chunks] == list(range(21, 120))
        assert errors == []

    def test_a_failure_comes_after_the_chunks_of_its_job(self, loop, runner, make):
        loop.submit([make([5], 4, by_step=True)])
        assert len(loop.step()) == 1
        runner.refused.add(5)
        with pytest.raises(InvalidRequestError):
            loop.step()
        assert loop.step() == []


class TestManyThreads:
    def test_random_closes_cancels_and_errors(self, loop, runner, make):
        """Whatever the others do, a stream gives its own numbers in order, and all places are free at the end."""
        failures = []
        lock = threading.Lock()

        def work(seed):
            dice = random.Random(seed)
            try:
                for _ in range(60):
                    with lock:
                        stream = Stream(loop, make([dice.randrange(1000)] * dice.randint(1, 40), dice.randint(1, 20)))
                    limit, first = dice.randrange(25), stream._job.request.prompt_ids[0]
                    for _, chunk in zip(range(limit), stream, strict=False):
                        assert not chunk.token_ids or chunk.token_ids[0] == first + stream._n - 1
                    way = dice.randrange(5)
                    if way == 0:
                        stream.close()
                    elif way == 1:
                        stream.cancel()
                    elif way == 2:
                        thread = threading.Thread(target=stream.close)
                        thread.start()
                        list(stream)
                        thread.join()
                    if way < 4:
                        ids = stream.result().token_ids
                        assert ids == list(range(first, first + len(ids)))
                    del stream
            except BaseException as error:
                failures.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
                assert not thread.is_alive(), "stuck"
        finally:
            sys.setswitchinterval(interval)
        assert failures == []
        assert loop.n_active == 0
        assert runner.held == {}

    def test_closing_the_engine_wakes_everybody(self, runner, loop, make):
        outcomes = []

        def read(stream):
            try:
                outcomes.append(stream.result().finish_reason)
            except EngineError as error:
                outcomes.append(str(error))

        readers = [threading.Thread(target=read, args=(Stream(loop, make([1], 10**5)),)) for _ in range(5)]
        for reader in readers:
            reader.start()
        while runner.steps < 20:
            pass
        loop.close()
        for reader in readers:
            reader.join(30)
            assert not reader.is_alive()
        assert len(outcomes) == 5
        assert all("closed" in outcome for outcome in outcomes)

    @pytest.mark.parametrize("way", ["close", "exclusive", "step"])
    def test_who_waits_for_the_engine_has_the_next_turn(self, runner, loop, make, monkeypatch, way):
        """Not the thread that made the last step and starts the next one before any other thread has woken."""

        def slow_step(work, step=runner.step):
            time.sleep(2e-4)  # as kernels do: others run meanwhile
            return step(work)

        monkeypatch.setattr(runner, "step", slow_step)
        streams = [Stream(loop, make([1], 5000)) for _ in range(2)]

        def read(stream):
            with suppress(EngineError):
                stream.result()

        readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for reader in readers:
            reader.start()
        while runner.steps < 20:
            time.sleep(1e-3)
        before = runner.steps
        if way == "close":
            loop.close()
        elif way == "exclusive":
            with loop.exclusive():
                steps = runner.steps
                time.sleep(5e-3)
                assert runner.steps == steps
        else:
            loop.step()
        assert runner.steps - before < 100
        for stream in streams:
            stream.close()
        for reader in readers:
            reader.join(30)
            assert not reader.is_alive()
