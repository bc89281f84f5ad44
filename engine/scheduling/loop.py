"""The step loop: scheduler and runner put together, safe to use from several threads.

There is no background thread. A thread that waits for output runs a step for all requests; other threads wait and find
their chunks in their own queues. Requests may be added and given up at any time, also while a step is running: the
lock is held only between steps. A step that fails ends the requests that were in it, with the error, and nothing else.
An interrupt (Ctrl-C) cuts a step short; it is deferred while scheduler state is inconsistent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.config import CHECKPOINT_SPACING
from engine.errors import EngineError
from engine.request import GenerationStats, Request, StreamChunk, TokenSample, Work
from engine.runner.protocol import Runner
from engine.scheduling.interrupts import deferral
from engine.scheduling.occupancy import Occupancy
from engine.scheduling.output import OutputAssembler
from engine.scheduling.scheduler import (
    Action,
    CopyPage,
    LeaveSlot,
    LoadPages,
    RestoreCheckpoint,
    SaveCheckpoint,
    SavePages,
    Scheduler,
)

log = logging.getLogger("engine")

WAIT_SECONDS = 0.1
"""After so long a waiting main thread looks whether it was interrupted."""

StepResult = TokenSample | EngineError | list[TokenSample] | None
"""Of one work item: the token drawn, why none could be, the scores of prompt tokens, or nothing."""


@dataclass
class Job:
    """A request on its way, with the chunks that no caller has fetched yet and what was saved by a preemption."""

    request: Request
    assembler: OutputAssembler
    by_step: bool = False
    queue: deque[StreamChunk] = field(default_factory=deque)
    error: Exception | None = None
    prompt_scores: list[TokenSample] = field(default_factory=list)
    told_scores: bool = False
    n_output: int = 0
    cached_tokens: int = 0
    saved: Any = None
    saved_state: Any = None
    submitted: float = 0.0
    started: float | None = None
    first: float | None = None
    last: float = 0.0

    def stats(self) -> GenerationStats:
        """Counts and times so far."""
        started = self.started if self.started is not None else self.submitted
        first = self.first if self.first is not None else self.last
        return GenerationStats(
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=self.n_output,
            queue_seconds=max(started - self.submitted, 0.0),
            prompt_seconds=max(first - started, 0.0),
            decode_seconds=max(self.last - first, 0.0),
            cached_tokens=self.cached_tokens,
        )


class EngineLoop:
    """Runs jobs on one runner.

    Args:
        runner: the model on its device.
        prefix_cache: use pages of earlier prompts that began with the same tokens.
        checkpoint_spacing: positions between checkpoints of recurrent states in prompts.
    """

    def __init__(
        self, runner: Runner, *, prefix_cache: bool = True, checkpoint_spacing: int = CHECKPOINT_SPACING
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(
            runner.max_sequences,
            runner.n_pages,
            prefill_chunk=runner.prefill_chunk,
            mixed_chunk=runner.mixed_chunk,
            mixed_per_sequence=runner.mixed_per_sequence,
            lookahead=runner.lookahead,
            prefix_cache=prefix_cache,
            checkpoints=None if runner.states is None else runner.states.n_checkpoints,
            checkpoint_spacing=checkpoint_spacing,
        )
        self._jobs: dict[int, Job] = {}
        self._fetchable: dict[int, Job] = {}
        self._abandoned: deque[int] = deque()
        self._lost: list[tuple[Action, Exception]] = []
        self._driver: threading.Thread | None = None
        self._claims = 0  # threads that wait for the turn after the running step
        self._closed = False
        # A plain lock: an abandoned stream may be finalized by the garbage collector while this thread holds it.
        self._changed = threading.Condition(threading.Lock())

    @property
    def n_active(self) -> int:
        """Requests that are waiting or running."""
        with deferral, self._changed:
            if self._driver is None:
                self._reap()
            return len(self._jobs)

    def occupancy(self) -> Occupancy:
        """What is running and waiting now, and how full the cache is."""
        with deferral, self._changed:
            return Occupancy.of(self._scheduler)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; they run as soon as somebody drives."""
        now = time.perf_counter()
        with deferral, self._changed:
            self._check_open()
            for job in jobs:
                job.submitted = job.last = now
                self._jobs[job.request.request_id] = job
                if job.by_step:
                    self._fetchable[job.request.request_id] = job
                request = job.request
                if request.max_output == 0 and (request.score_from is None or len(request.prompt_ids) == 1):
                    job.queue.append(self._chunk(job, "", (), "length"))
                    self._jobs.pop(request.request_id)
                else:
                    self._scheduler.add(request)

    def next_chunk(
        self, job: Job, take: Callable[[StreamChunk], None] = lambda chunk: None, *, every: bool = False
    ) -> StreamChunk:
        """The next chunk of a submitted job; drives the engine while nobody else does.

        Args:
            job: the job.
            take: told the chunk as it leaves the queue: an interrupt finds it in one of the two places.
            every: take all chunks there are; the last one is returned.

        Raises:
            Exception: what made a step of this job fail, after all its earlier chunks.
        """
        with deferral:
            while True:
                with self._changed:
                    while not job.queue and job.error is None and (self._busy() or self._claims):
                        self._wait()
                    work = self._begin() if not job.queue and job.error is None else None
                    if job.queue and work is None:
                        deferral.check()
                        while True:
                            chunk = job.queue.popleft()
                            take(chunk)
                            if not (every and job.queue):
                                return chunk
                    if job.error is not None:
                        raise job.error
                assert work is not None, "an unfinished job has work to do"
                self._finish(work)

    def step(self) -> list[StreamChunk]:
        """Advance all running sequences by one step; returns what the jobs made with by_step have got since.

        Raises:
            Exception: what ended such a job, named by the attribute `request_id`; told once, after the job's chunks.
        """
        chunks: list[StreamChunk] = []
        try:
            with deferral:
                with self._changed:
                    self._take_turn()
                    self._forget_told()
                    self._raise_failure()
                    work = self._begin()
                if work is not None:
                    self._finish(work)
                with self._changed:
                    deferral.check()
                    chunks = self._fetch_all()
        except KeyboardInterrupt:
            with deferral, self._changed:  # nobody has seen them: the next call gives them
                for chunk in reversed(chunks):
                    self._fetchable[chunk.request_id].queue.appendleft(chunk)
            raise
        return chunks

    def cancel(self, request_id: int) -> None:
        """Give a request up; its slot is free before the next step. Unknown and finished requests are ignored.

        Takes no lock that could be held by this thread, so that it may be called by a finalizer.
        """
        with deferral:
            self._abandoned.append(request_id)
            if self._changed.acquire(blocking=False):
                try:
                    if self._driver is None:  # else perhaps our own step: it reaps when it is done
                        self._reap()
                        self._changed.notify_all()
                finally:
                    self._changed.release()

    @contextmanager
    def exclusive(self) -> Iterator[Runner]:
        """The runner for a caller who needs it outside the step loop; steps wait meanwhile."""
        with deferral, self._changed:
            self._take_turn()
            self._check_open()
            self._driver = threading.current_thread()
        try:
            yield self._runner
        finally:
            with deferral, self._changed:
                self._driver = None
                self._changed.notify_all()

    def close(self) -> None:
        """End every request with an error and close the runner. A call that was cut short can be repeated."""
        with deferral, self._changed:
            self._take_turn()
            self._closed = True
            self._driver = threading.current_thread()
            self._reap()
            for job in self._jobs.values():
                job.error = EngineError("the model was closed while this request was running")
            self._jobs.clear()
        try:
            self._runner.close()
        finally:
            with deferral, self._changed:
                self._driver = None
                self._changed.notify_all()

    # The rest is called with interrupts held back and the lock held, except _finish and _run.

    def _wait(self) -> None:
        """Until somebody's step is done; an interrupt is heeded now and then."""
        self._changed.wait(WAIT_SECONDS if threading.current_thread() is threading.main_thread() else None)
        deferral.check()

    def _take_turn(self) -> None:
        """Until nobody is inside a step; without a claim whoever drives is in the next one before we are awake."""
        self._claims += 1
        try:
            while self._busy():
                self._wait()
        finally:
            self._claims -= 1
            self._changed.notify_all()

    def _busy(self) -> bool:
        """Whether another thread is inside a step. Our own name there means that an interrupt cut our step short."""
        driver = self._driver
        return driver is not None and driver is not threading.current_thread() and driver.is_alive()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model is closed; open it again with LLM(...)")

    def _fetch_all(self) -> list[StreamChunk]:
        """The chunks of all jobs made with by_step; the failure of one of them where there are none."""
        chunks = [chunk for job in self._fetchable.values() for chunk in job.queue]
        if not chunks:
            self._raise_failure()
        for job in self._fetchable.values():
            job.queue.clear()
        return chunks

    def _forget_told(self) -> None:
        """Drop the ended jobs of which everything has been fetched."""
        over = [i for i, job in self._fetchable.items() if i not in self._jobs and job.error is None and not job.queue]
        for request_id in over:
            del self._fetchable[request_id]

    def _raise_failure(self) -> None:
        """Tell the failure of one job whose chunks have all been fetched by step()."""
        for request_id, job in self._fetchable.items():
            if job.error is not None and not job.queue:
                del self._fetchable[request_id]
                job.error.request_id = request_id  # type: ignore[attr-defined]
                raise job.error

    def _begin(self) -> list[Work] | None:
        """What the next step does; None where there is nothing to do. It may be moving pages alone."""
        self._check_open()
        self._reap()
        work = self._scheduler.plan()
        if not work and not self._scheduler.actions:
            return None
        self._driver = threading.current_thread()
        now = time.perf_counter()
        for item in work:
            job = self._jobs[item.sequence.request_id]
            if job.started is None:
                job.started = now
                job.cached_tokens = item.sequence.cached_tokens
        return work

    def _finish(self, work: list[Work]) -> None:
        """Run planned work and hand out what it gave. An interrupt leaves all sequences as they were before."""
        done: list[StepResult] | None = None
        failure: Exception | None = None
        ours = deferral.reaches_us()
        try:
            if ours:
                deferral.lifted = True
                deferral.check()
            done = self._run(work)
        except Exception as error:
            failure = error
        finally:
            if ours:
                deferral.lifted = False
            with self._changed:
                self._driver = None
                self._changed.notify_all()  # they wake when the lock is free, whatever becomes of the rest
                self._tell_lost()
                if done is not None:
                    self._deliver(work, done)
                elif failure is not None:
                    for item in work:
                        if item.sequence.request_id in self._jobs:
                            self._end(self._jobs[item.sequence.request_id], failure)

    def _tell_lost(self) -> None:
        """End the requests whose pages or states could not be moved."""
        while self._lost:
            action, error = self._lost[-1]
            if isinstance(action, SaveCheckpoint):
                self._scheduler.drop_checkpoint(action)
                log.warning("a state could not be kept for later prompts: %s", error)
            elif action.request_id in self._jobs:
                self._end(self._jobs[action.request_id], error)
            self._lost.pop()

    def _run(self, work: list[Work]) -> list[StepResult]:
        self._move_pages()
        lost = {action.request_id for action, _ in self._lost if not isinstance(action, SaveCheckpoint)}
        work[:] = [item for item in work if item.sequence.request_id not in lost]
        batch = [item for item in work if not item.score]
        samples = iter(self._runner.step(batch) if batch else [])
        return [self._runner.score(item) if item.score else next(samples) for item in work]

    def _move_pages(self) -> None:
        """Do what the plan wants of the cache. One that was cut short is done again, which changes nothing.

        One that fails is not tried again. It ends the request it was for, unless that can go on without it.
        """
        actions = self._scheduler.actions
        while actions:
            action = actions[0]
            try:
                self._move(action)
            except Exception as error:
                self._lost.append((action, error))
            actions.popleft()

    def _move(self, action: Action) -> None:
        runner, states = self._runner, self._runner.states
        if isinstance(action, CopyPage):
            runner.copy_pages([(action.source, action.target)])
        elif isinstance(action, LeaveSlot):
            runner.release(action.slot)
            if states is not None and action.place is not None:
                states.move(action.slot, action.target, action.place)
        elif isinstance(action, SaveCheckpoint):
            assert states is not None
            states.checkpoint(action.slot, action.place, action.entry)
        elif isinstance(action, RestoreCheckpoint):
            assert states is not None
            for lost, error in self._lost:
                if isinstance(lost, SaveCheckpoint) and lost.entry == action.entry:
                    raise error  # the entry was not written
            states.restore(action.entry, action.slot, action.place)
        else:
            self._move_out_or_in(action)

    def _move_out_or_in(self, action: SavePages | LoadPages) -> None:
        """What a preempted sequence has in the cache leaves it or comes back."""
        runner, states = self._runner, self._runner.states
        job = self._jobs.get(action.request_id)  # None: given up meanwhile
        if isinstance(action, SavePages):
            runner.release(action.slot)
            if job is not None:
                job.saved = runner.save_pages(action.pages)
                if states is not None and action.place is not None:
                    job.saved_state = states.save(action.slot, action.place)
        elif job is not None:
            runner.load_pages(job.saved, action.pages)
            if states is not None and action.place is not None:
                states.load(job.saved_state, action.slot, action.place)

    def _deliver(self, work: list[Work], done: list[StepResult]) -> None:
        now = time.perf_counter()
        for item, result in zip(work, done, strict=True):
            job = self._jobs[item.sequence.request_id]
            job.last = now
            if isinstance(result, EngineError):
                self._end(job, result)
                continue
            if isinstance(result, list):
                job.prompt_scores.extend(result)
                self._scheduler.commit(item, None)
            else:
                self._scheduler.commit(item, result)
                if result is not None:
                    self._emit(job, result, now)
            if job.request.max_output == 0 and self._scheduler.is_scored(job.request.request_id):
                job.queue.append(self._chunk(job, "", (), "length"))
                self._end(job)

    def _emit(self, job: Job, sample: TokenSample, now: float) -> None:
        job.first = now if job.first is None else job.first
        job.n_output += 1
        try:
            text, finish = job.assembler.push(sample)
        except Exception as error:  # one request's text must not end its neighbours
            self._end(job, error)
            return
        job.queue.append(self._chunk(job, text, (sample,), finish))
        if finish is not None:
            self._end(job)

    def _chunk(self, job: Job, text: str, samples: tuple[TokenSample, ...], finish: str | None) -> StreamChunk:
        request = job.request
        scores: tuple[TokenSample | None, ...] | None = None
        first = request.score_from
        if first is not None and not job.told_scores and len(job.prompt_scores) == len(request.prompt_ids) - first:
            scores = (*[None] * first, *job.prompt_scores)
            job.told_scores = True
        return StreamChunk(
            text=text,
            token_ids=tuple([sample.token_id for sample in samples]),
            finish_reason=finish,
            logprobs=samples if request.params.logprobs is not None else (),
            prompt_logprobs=scores,
            stats=job.stats() if finish is not None else None,
            request_id=request.request_id,
        )

    def _reap(self) -> None:
        """Free what was given up since the last step."""
        while self._abandoned:
            job = self._jobs.get(self._abandoned.popleft())
            if job is not None:
                job.queue.append(self._chunk(job, "", (), "cancelled"))
                self._end(job)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        job.error = error
        self._jobs.pop(job.request.request_id, None)
        slot = self._scheduler.remove(job.request.request_id)
        if slot is not None:
            self._runner.release(slot)
