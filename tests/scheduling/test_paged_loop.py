"""The step loop on a runner whose pages hold, for every position, what a model's keys and values depend on.

A cell is a hash of all tokens up to its position and of how each was computed, as prompt or as generated token. The
runner compares every cell that a sequence reads with a slow recomputation, and draws tokens from what it read: a page
that is lost, shared by mistake, restored wrongly or found for the wrong prompt changes a text or fails a step.
"""

import gc
import random
import tracemalloc
from itertools import count

import pytest

from engine.api.stream import Stream
from engine.config import PAGE
from engine.errors import EngineError
from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.loop import EngineLoop, Job
from engine.scheduling.output import OutputAssembler

PROMPT, GENERATED = "prompt", "generated"


class RunnerFailure(EngineError):
    """A step that the test made fail."""


def draw(cells, seed):
    """The token after positions whose cells are given."""
    return hash((cells[-1], len(cells), seed)) % 50


class Truth:
    """What a request must give, computed alone and without any cache."""

    def __init__(self, prompt, seed, max_output):
        self.cells, last = [], 0
        for token in prompt:
            last = hash((last, token, PROMPT))
            self.cells.append(last)
        self.output_ids = []
        for _ in range(max_output):
            token = draw(self.cells, seed)
            self.output_ids.append(token)
            self.cells.append(hash((self.cells[-1], token, GENERATED)))


class CellRunner:
    """A runner that can be told to fail or to be interrupted in the middle of what it does."""

    def __init__(self, n_pages, max_sequences, prefill_chunk, mixed_chunk, lookahead):
        self.n_pages, self.max_sequences, self.lookahead = n_pages, max_sequences, lookahead
        self.prefill_chunk, self.mixed_chunk = prefill_chunk, mixed_chunk
        self.pages = [["never written"] * PAGE for _ in range(n_pages)]
        self.live = {}  # slot -> sequence, from its first step until release()
        self.ahead = {}  # slot -> (pages, position) that a step launched ahead is still to write to
        self.truth = {}  # request id -> Truth
        self.first_start = {}  # request id -> first position fed
        self.n_saved = self.n_steps = 0
        self.trouble = lambda: None
        self.states = None

    def step(self, work):
        self.run_ahead()
        self.n_steps += 1
        fed = {item.sequence.request_id for item in work}
        assert len(fed) == len(work) <= self.max_sequences
        starved = [s.request_id for s in self.live.values() if s.output_ids and s.request_id not in fed]
        assert not starved, f"streams {starved} did not get a token"
        n_prompt = sum(len(item.token_ids) for item in work if not item.decode)
        assert n_prompt <= (self.mixed_chunk if any(item.decode for item in work) else self.prefill_chunk)
        samples = []
        for item in work:
            self.trouble()
            cells = self.feed(item)
            samples.append(TokenSample(draw(cells, item.sequence.seed)) if item.sample else None)
        self.trouble()
        for item in work:
            if item.decode and self.lookahead:
                self.ahead[item.sequence.slot] = list(item.sequence.pages), item.start + 1
        return samples

    def score(self, work):
        cells = self.feed(work)
        targets = work.sequence.prompt_ids[work.start + 1 :]
        return [TokenSample(target, float(cell)) for target, cell in zip(targets, cells[work.start :], strict=False)]

    def feed(self, item):
        """Write the item's cells; returns all cells of the sequence, as read."""
        sequence, end = item.sequence, item.start + len(item.token_ids)
        assert item.start == sequence.n_cached
        assert end <= len(sequence.pages) * PAGE, "fed beyond its pages"
        assert len(set(sequence.pages)) == len(sequence.pages)
        assert self.live.setdefault(sequence.slot, sequence) is sequence, "a slot used twice"
        self.first_start.setdefault(sequence.request_id, item.start)
        truth = self.truth[sequence.request_id].cells
        assert self.read(sequence, item.start) == truth[: item.start], "the cache holds something else"
        written = set(sequence.pages[item.start // PAGE : -(-end // PAGE)])
        for other in self.live.values():
            assert other is sequence or written.isdisjoint(other.pages), "a page with two holders is written"
        last = truth[item.start - 1] if item.start else 0
        assert item.decode == (item.start >= len(sequence.prompt_ids))
        for position, token in enumerate(item.token_ids, start=item.start):
            last = hash((last, token, GENERATED if item.decode else PROMPT))
            self.pages[sequence.pages[position // PAGE]][position % PAGE] = last
        return self.read(sequence, end)

    def read(self, sequence, n):
        cells = []
        for page in sequence.pages[: -(-n // PAGE)]:
            cells += self.pages[page]
        return cells[:n]

    def run_ahead(self):
        """Steps launched ahead write where they have pages; nobody may mind, as those positions are computed again."""
        for pages, start in self.ahead.values():
            for position in range(start, min(start + self.lookahead, len(pages) * PAGE)):
                self.pages[pages[position // PAGE]][position % PAGE] = "computed ahead"
        self.ahead = {}

    def release(self, slot):
        self.live.pop(slot, None)
        self.ahead.pop(slot, None)

    def copy_pages(self, pairs):
        self.run_ahead()
        self.trouble()
        for source, target in pairs:
            self.pages[target] = list(self.pages[source])
        self.trouble()

    def save_pages(self, pages):
        self.run_ahead()
        self.trouble()
        self.n_saved += 1
        return [list(self.pages[page]) for page in pages]

    def load_pages(self, saved, pages):
        self.run_ahead()
        self.trouble()
        for page, cells in zip(pages, saved, strict=True):
            self.pages[page] = list(cells)
        self.trouble()

    def close(self):
        pass


def make_job(runner, request_id, prompt, n, *, seed=0, score_from=None, by_step=True):
    runner.truth[request_id] = Truth(prompt, seed, n)
    params = SamplingParams(prompt_logprobs=None if score_from is None else 0)
    request = Request(request_id, list(prompt), params, seed, n, score_from)
    return Job(request, OutputAssembler(request, None, ()), by_step)


class World:
    """A loop under random use, with everything that its requests have given so far."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        choose = self.random.choice
        self.runner = self.make_runner(
            n_pages=choose([6, 9, 20, 60]),
            max_sequences=choose([1, 3, 8]),
            prefill_chunk=choose([16, 100, 512]),
            mixed_chunk=choose([7, 16]),
            lookahead=choose([0, 3]),
        )
        self.runner.trouble = self.trouble
        self.loop = self.make_loop(prefix_cache=choose([True, True, False]))
        self.ids = count(1)
        self.families = [self.tokens(380) for _ in range(4)]
        self.jobs, self.chunks, self.ended, self.failed = {}, {}, {}, set()
        self.cancelled = set()
        self.calm = False

    def make_runner(self, **options):
        return CellRunner(**options)

    def make_loop(self, **options):
        return EngineLoop(self.runner, **options)

    def tokens(self, n):
        return [self.random.randrange(50) for _ in range(n)]

    def trouble(self):
        if not self.calm and self.random.random() < 0.004:
            raise KeyboardInterrupt if self.random.random() < 0.7 else RunnerFailure("made to fail")

    def submit(self):
        room = self.runner.n_pages * PAGE
        length = self.random.choice([1, 5, PAGE, PAGE + 1, 2 * PAGE, self.random.randint(1, 380)])
        family = self.random.choice(self.families)
        prompt = family[: self.random.choice([length, length // 2, length])] + self.tokens(
            self.random.choice([0, 0, 3])
        )
        prompt = prompt[: min(length, room - 1)] or [1]
        n = self.random.choice([1, 3, 40, self.random.randint(1, 150)])
        n = min(n, room + 1 - len(prompt))
        score_from = None
        if len(prompt) > 1 and self.random.random() < 0.15:
            score_from, n = self.random.randint(1, len(prompt) - 1), self.random.choice([0, n])
        request_id = next(self.ids)
        job = make_job(self.runner, request_id, prompt, n, seed=self.random.randrange(3), score_from=score_from)
        self.jobs[request_id], self.chunks[request_id] = job, []
        self.loop.submit([job])

    def cancel(self):
        alive = [request_id for request_id in self.jobs if request_id not in self.ended]
        if alive:
            request_id = self.random.choice(alive)
            self.cancelled.add(request_id)
            self.loop.cancel(request_id)

    def step(self):
        started = set(self.runner.first_start)
        try:
            for chunk in self.loop.step():
                self.chunks[chunk.request_id].append(chunk)
                if chunk.finish_reason is not None:
                    self.ended[chunk.request_id] = chunk.finish_reason
        except KeyboardInterrupt:
            return
        except RunnerFailure as error:
            self.failed.add(error.request_id)
            self.ended[error.request_id] = "failed"
        for request_id in set(self.runner.first_start) - started:
            waiting = [
                i for i in self.jobs if i < request_id and i not in self.runner.first_start and i not in self.ended
            ]
            assert not set(waiting) - self.cancelled - self.failed, f"{request_id} overtook {waiting}"

    def check(self):
        """Everything is over: every request gave what it had to, and nothing is held any more."""
        for request_id, job in self.jobs.items():
            truth, request = self.runner.truth[request_id], job.request
            ids = [token for chunk in self.chunks[request_id] for token in chunk.token_ids]
            assert ids == truth.output_ids[: len(ids)]
            reason = self.ended[request_id]
            assert reason == "length" or request_id in self.cancelled | self.failed
            if reason == "length":
                assert len(ids) == request.max_output
                stats = self.chunks[request_id][-1].stats
                assert stats.cached_tokens == self.runner.first_start.get(request_id, 0) < len(request.prompt_ids)
            first = request.score_from
            if first is not None and (ids or reason == "length"):
                (scores,) = (c.prompt_logprobs for c in self.chunks[request_id] if c.prompt_logprobs is not None)
                assert [s and s.token_id for s in scores] == [None] * first + request.prompt_ids[first:]
                assert [s.logprob for s in scores[first:]] == [
                    float(cell) for cell in truth.cells[first - 1 : len(request.prompt_ids) - 1]
                ]
        assert self.loop.n_active == 0
        assert not self.runner.live
        blocks = self.loop._scheduler.blocks
        assert blocks.n_available == blocks.n_pages
        assert not any(blocks.holders(page) for page in range(blocks.n_pages))


@pytest.mark.parametrize("seed", range(24))
def test_any_order_of_arrivals_cancels_interrupts_and_failures(seed, monkeypatch):
    monkeypatch.setattr("engine.scheduling.scheduler.PATIENCE", seed % 3)  # sequences change slots all the time
    world = World(seed)
    for _ in range(250):
        for _ in range(world.random.choice([0, 0, 0, 1, 1, 4])):
            world.submit()
        if world.random.random() < 0.1:
            world.cancel()
        world.step()
    world.calm = True
    for _ in range(100_000):
        if len(world.ended) == len(world.jobs):
            break
        world.step()
    world.step()  # what was moved or held for copying is let go
    world.check()


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
    """Whoever waits for a text gets it or an error; nobody waits for ever."""
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
