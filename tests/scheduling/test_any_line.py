"""Exceptions at any line of the engine's own code, as a signal handler or another thread may raise them.

One loop works on without end; in every second call an exception is raised, at the first, second, third ... line that
the call executes. All requests must give what they give undisturbed, and slots, pages and entries must add up after
every call (docs/decisions/exceptions-at-any-line.md).
"""

import random
from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest

from engine.api.llm import LLM
from engine.api.stream import Stream
from engine.config import PAGE
from engine.scheduling.loop import EngineLoop
from tests.support.injection import Injected, Injection, engine_files
from tests.support.scheduling.books import check_books
from tests.support.scheduling.cell_runner import CellRunner, Forcing, make_job
from tests.support.scheduling.state_runner import StateRunner

PARTS = (
    "actions",
    "checkpoints",
    "delivery",
    "failures",
    "forced",
    "job",
    "loop",
    "moves",
    "output",
    "page_pool",
    "pieces",
    "prefixes",
    "scheduler",
    "slots",
    "told",
)
FILES = engine_files(*(f"scheduling/{part}.py" for part in PARTS), "api/stream.py", "api/llm.py", "concurrency/turn.py")
ENOUGH = 50
"""Calls in a row that end before the chosen line: there are no longer ones."""
MOST = 1200
"""Lines of the longest calls that are tried; result() has more, which are the same again."""


class Work:
    """A loop that never runs out of requests, with all that they have given."""

    def __init__(self, runner, seed):
        self.runner, self.random = runner, random.Random(seed)
        self.loop = EngineLoop(runner, checkpoint_spacing=PAGE)
        self.ids = count(1)
        self.family = [self.random.randrange(50) for _ in range(2 * PAGE + 10)]

    def job(self, *, by_step):
        length = self.random.choice([3, PAGE, PAGE + 20, 2 * PAGE + 9])
        prompt = [*self.family[:length], self.random.randrange(50)]
        scored = self.random.random() < 0.2
        n = self.random.choice([0, 2]) if scored else self.random.choice([1, 4, 30])
        mask = Forcing() if self.random.random() < 0.4 else None
        score_from = 2 if scored else None
        return make_job(
            self.runner, next(self.ids), prompt, n, seed=3, score_from=score_from, by_step=by_step, mask=mask
        )

    def check(self, job, chunks, *, cancelled=False):
        truth, request = self.runner.truth[job.request.request_id], job.request
        ids = [token for chunk in chunks for token in chunk.token_ids]
        assert ids == truth.output_ids[: len(ids)], "other tokens than undisturbed"
        assert cancelled or len(ids) == request.max_output, "tokens were lost"
        if request.score_from is not None and not cancelled:
            (scores,) = (chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None)
            assert [s.logprob for s in scores[2:]] == [float(c) for c in truth.cells[1 : len(request.prompt_ids) - 1]]

    def end(self):
        for _ in range(3):
            self.loop.step()  # what is still to be moved
        check_books(self.loop)
        assert self.loop.n_active == 0
        assert not self.runner.live
        assert self.loop._scheduler.blocks.n_available == self.runner.n_pages


def injections(kinds=(Injected, KeyboardInterrupt), events=("call", "line", "return")):
    """One injection after the other, at later and later lines, until the calls are over before."""
    missed, at = 0, 0
    while missed < ENOUGH and at < MOST:
        at += 1
        injection = Injection(at, FILES, kinds[at % len(kinds)], events=events)
        yield injection
        missed = missed + 1 if injection.where is None else 0


def make_runner(kind, **options):
    """So few pages that sequences are preempted; prompts in pieces; shared beginnings."""
    return kind(5, 3, 64, 16, 3, **options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [CellRunner, StateRunner])
def test_steps(kind, seed, monkeypatch):
    monkeypatch.setattr("engine.scheduling.slots.PATIENCE", 1)  # sequences change slots all the time
    work = Work(make_runner(kind), seed)
    llm = SimpleNamespace(_loop=work.loop)
    jobs, chunks, cancelled = {}, {}, set()

    def take(given):
        for chunk in given:
            chunks[chunk.request_id].append(chunk)
            if chunk.finish_reason is not None:
                number = chunk.request_id
                work.check(jobs.pop(number), chunks.pop(number), cancelled=chunk.finish_reason == "cancelled")
                assert chunk.finish_reason == "length" or number in cancelled

    n_places = 0
    for injection in injections():
        while len(jobs) < 5:
            job = work.job(by_step=True)
            jobs[job.request.request_id], chunks[job.request.request_id] = job, []
            work.loop.submit([job])
        if work.random.random() < 0.05:
            number = work.random.choice([*jobs])
            cancelled.add(number)
            work.loop.cancel(number)
        over, given = injection.during(lambda: LLM.step(llm))
        n_places += not over
        take(given or ())
        take(LLM.step(llm))
        check_books(work.loop)
    while jobs:
        take(LLM.step(llm))
    work.end()
    assert n_places > 400
    assert work.runner.n_saved > 5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [CellRunner, StateRunner])
def test_streams(kind, seed):
    """next(), result(), close(), submitting and forgetting streams."""
    work = Work(make_runner(kind), seed)
    streams = []
    ways = Counter()

    def make(injection):
        job = work.job(by_step=False)
        over, stream = injection.during(lambda: Stream(work.loop, job))
        if over:
            streams.append((job, stream, [] if work.random.random() < 0.7 else None))

    def next_chunk(stream, got, injection):
        """Whether it was the end."""
        over, chunk = injection.during(lambda: next(stream, None))
        if over and chunk is not None:
            got.append(chunk)
        return over and chunk is None

    def finish(job, stream, got):
        if got is not None:
            while not next_chunk(stream, got, Injection(0, FILES)):
                pass
            work.check(job, got)
        assert stream.result().token_ids == work.runner.truth[job.request.request_id].output_ids

    def close(job, stream, injection):
        injection.during(stream.close)
        if not job.over:
            stream.close()
        result = stream.result()
        assert result.token_ids == [token for chunk in job.chunks for token in chunk.token_ids]
        work.check(job, job.chunks, cancelled=True)

    for injection in injections():
        short = Injection(work.random.randint(1, 60), FILES)  # for calls of few lines
        while len(streams) < 4:
            make(Injection(0, FILES))
        which = work.random.randrange(len(streams))
        job, stream, got = streams[which]
        way = work.random.choice(["go on"] * 16 + ["close", "make", "forget"])
        over = way in ("close", "forget")
        if way == "make":
            make(short)
        elif way == "close":
            close(job, stream, short)
        elif way == "go on" and got is None:
            over, _ = injection.during(stream.result)
        elif way == "go on":
            over = next_chunk(stream, got, injection) or next_chunk(stream, got, Injection(0, FILES))
        ways[way] += (short if way in ("make", "close") else injection).where is not None
        if over:
            del streams[which]
            if way == "go on":
                finish(job, stream, got)
        del stream, job
        check_books(work.loop)
    while streams:
        finish(*streams.pop())
    work.end()
    assert ways["go on"] > 250
    assert min(ways["close"], ways["make"]) > 3
