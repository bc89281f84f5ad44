"""A step loop under random use: arrivals, cancellations, interrupts and failures, with all that requests were given."""

import random
from itertools import count

from engine.config import PAGE
from engine.scheduling.loop import EngineLoop
from tests.support.scheduling.cell_runner import CellRunner, Forcing, RunnerFailure, make_job


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
        if self.runner.states is None and (room := choose([None, 0, 3, 50])) is not None:
            self.runner.known_room = lambda n, wanted: min(wanted, room)
        self.loop = self.make_loop(prefix_cache=choose([True, True, False]))
        self.ids = count(1)
        self.families = [self.tokens(380) for _ in range(4)]
        self.jobs, self.chunks, self.ended, self.failed = {}, {}, {}, set()
        self.cancelled = set()
        self.calm = False

    def run(self):
        """Random use, then calm until every request has ended and all that was held is let go; checks what is left."""
        for _ in range(250):
            for _ in range(self.random.choice([0, 0, 0, 1, 1, 4])):
                self.submit()
            if self.random.random() < 0.1:
                self.cancel()
            self.step()
        self.calm = True
        for _ in range(100_000):
            if len(self.ended) == len(self.jobs):
                break
            self.step()
        for _ in range(3):
            self.step()  # what was moved or is still to be copied
        self.check()

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
        seed, mask = self.random.randrange(3), Forcing() if self.random.random() < 0.3 else None
        job = make_job(self.runner, request_id, prompt, n, seed=seed, score_from=score_from, mask=mask)
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
            waiting = [i for i in waiting if not self.jobs[i].over]  # one that failed may not have been told yet
            assert not set(waiting) - self.cancelled, f"{request_id} overtook {waiting}"

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
