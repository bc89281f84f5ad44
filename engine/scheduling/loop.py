"""The step loop: scheduler and runner put together, safe to use from several threads.

There is no background thread. A thread that waits for output runs a step for all requests; other threads wait and find
their chunks in their own jobs. Requests may be added and given up at any time, also while a step is running. A step
that fails ends the requests that were in it, with the error, and nothing else.

One thread has the turn at a time, and changes what is here while it has it; others only append to `_inbox` and
`_abandoned`. An exception (Ctrl-C, a signal handler that raises) may end that thread's call at any line. It undoes
nothing: the next call that has the turn recovers (docs/decisions/exceptions-at-any-line.md).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from engine.concurrency import fork
from engine.concurrency.turn import Hold, Turn
from engine.config import CHECKPOINT_SPACING
from engine.errors import EngineError, copy_error
from engine.request import StreamChunk, Work
from engine.runner.protocol import Runner
from engine.scheduling.actions import SaveCheckpoint
from engine.scheduling.delivery import DoneStep, deliver
from engine.scheduling.exclusive import Exclusive
from engine.scheduling.failures import Failures
from engine.scheduling.forced import ForcedTokens
from engine.scheduling.job import Job, Owner
from engine.scheduling.moves import Moves
from engine.scheduling.occupancy import Occupancy
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.told import Told

log = logging.getLogger("engine")


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
            known_room=runner.known_room,
            lookahead=runner.lookahead,
            prefix_cache=prefix_cache,
            checkpoints=None if runner.states is None else runner.states.n_checkpoints,
            checkpoint_spacing=checkpoint_spacing,
        )
        self._turn = Turn()
        self._failures = Failures()
        self._moves = Moves(runner, self._failures)
        self._forced = ForcedTokens(runner)
        self._inbox: deque[Job] = deque()  # submitted, not yet seen by a thread with the turn
        self._abandoned: deque[int | Owner] = deque()
        self._jobs: dict[int, Job] = {}  # that have not ended, in order of arrival
        self._told = Told()
        self._unsettled = False  # a change has begun and not ended
        self._unfinished: DoneStep | None = None  # a step that is being committed
        self._closed = False
        self._closed_runner = False
        fork.register(self)

    @property
    def n_active(self) -> int:
        """Requests that are waiting or running."""
        self._settle_if_free()
        return len(self._jobs) + len(self._inbox)

    def occupancy(self) -> Occupancy:
        """What is running and waiting now, and how full the cache is."""
        self._settle_if_free()
        return Occupancy.of(self._scheduler)

    def submit(self, jobs: Sequence[Job], owner: Any = None) -> None:
        """Queue jobs; they run as soon as a thread drives.

        Args:
            jobs: the jobs.
            owner: when this has been garbage-collected the jobs are given up; None: by cancel() alone.
        """
        self._check_open()
        now = time.perf_counter()
        for job in jobs:
            request = job.request
            job.submitted = job.last = now
            if owner is not None:
                # A method in C: no exception can come between the end of the owner and this.
                job.owner = Owner(owner, self._abandoned.append)
                job.owner.request_id = request.request_id
            if request.max_output == 0 and (request.score_from is None or len(request.prompt_ids) == 1):
                job.give("", None, "length")
        self._inbox.extend(jobs)

    def wait_for(self, job: Job, n: int) -> None:
        """Until a submitted job has more than n chunks, or has failed; drives the engine while no other thread does.

        Raises:
            Exception: raised from outside into this thread, or a step failed for the first time with an exception that
                is not the engine's own. Nothing is lost: the call may be made again.
        """
        check = False
        while not job.has(n):
            hold = Hold()
            try:
                taken = self._turn.take(hold, check=check)
                if taken and not job.has(n) and not self._advance():
                    assert job.has(n), "an unfinished job has work to do"
            finally:
                self._turn.release(hold)
            if not taken:
                check = not self._turn.sleep(lambda: job.has(n) or self._turn.is_open())

    def step(self, chunks: list[StreamChunk] | None = None) -> list[StreamChunk]:
        """Advance all running sequences by one step; returns what the jobs made with by_step have got since.

        Args:
            chunks: an empty list to put them into. If an exception keeps the caller from using them, give_back() has
                the next call return them again.

        Raises:
            Exception: what ended such a job, named by the attribute `request_id`; told once, after the job's chunks.
        """
        given: list[StreamChunk] = [] if chunks is None else chunks
        hold = Hold()
        try:
            self._turn.wait(hold)
            self._check_open()
            self._settle()
            self._told.forget_over(self._jobs)
            self._told.raise_failure()
            self._advance()
            self._told.collect(given)
            self._turn.release(hold)
            return given
        except BaseException as error:
            self._turn.release(hold)
            if chunks is None:
                self.give_back(given, error)
            raise

    def give_back(self, chunks: Sequence[StreamChunk], error: BaseException) -> None:
        """The caller of step() got an exception instead of these."""
        self._told.give_back(chunks, error)

    def cancel(self, request_id: int) -> None:
        """Give a request up; its slot is free before the next step. Unknown and finished requests are ignored.

        Waits for nothing, so that it may be called by a signal handler.
        """
        self._abandoned.append(request_id)
        self._settle_if_free()

    def exclusive(self) -> AbstractContextManager[Runner]:
        """The runner for a caller who needs it outside the step loop; steps wait meanwhile."""
        return Exclusive(self._turn, self._runner, self._begin_exclusive)

    def close(self) -> None:
        """End every request with an error and close the runner.

        One that was cut short can be repeated; after one that was not a further call does nothing.
        """
        hold = Hold()
        try:
            self._turn.wait(hold)
            if self._closed_runner:
                return
            self._closed = self._unsettled = True
            self._end_all("the model was closed while this request was running")
            self._settle()
            self._runner.close()
            self._closed_runner = True
        finally:
            self._turn.release(hold)

    def after_fork(self) -> None:
        """In the child of a fork: other threads are gone, wherever they were, and so is the use of what they asked."""
        if not self._turn.is_held_here():
            self._turn = Turn()
        self._unsettled = True
        self._end_all("this process was forked while this request was running; make it again in the child")

    # The rest is called by the thread that has the turn.

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the model is closed; open it again with LLM(...)")

    def _end_all(self, reason: str) -> None:
        for job in (*self._jobs.values(), *self._inbox):
            if not job.over:
                job.error = EngineError(reason)

    def _advance(self) -> bool:
        """One step of all running sequences; False where there is nothing to do. It may be moving pages alone."""
        self._check_open()
        self._settle()
        work = self._plan()
        if not work and not self._scheduler.actions:
            return False
        try:
            done = self._run(work)
        except Exception as error:
            if not self._failures.is_own(error):
                raise
            self._fail(work, error)
            return True
        self._failures.forget()
        self._unfinished = done  # from here on it is committed, whatever happens: see _recover()
        self._deliver(done)
        self._unfinished = None
        self._settle()
        return True

    def _begin_exclusive(self) -> None:
        self._check_open()
        self._settle()

    def _settle_if_free(self) -> None:
        """Settle, unless another call has the turn; that one, or the next, will."""
        hold = Hold()
        try:
            if self._turn.take(hold):
                self._settle()
        finally:
            self._turn.release(hold)

    def _settle(self) -> None:
        """Take in what other threads have submitted and given up, after what an exception left undone."""
        if self._unsettled or self._unfinished is not None:
            self._recover()
        if not (self._inbox or self._abandoned or self._moves.lost):
            return
        self._unsettled = True
        while self._inbox:
            job = self._inbox[0]
            if job.by_step:
                self._told.watch(job)
            if not job.over:
                self._jobs[job.request.request_id] = job
                self._scheduler.add(job.request)
            self._inbox.popleft()
        while self._abandoned:
            one = self._abandoned[0]
            abandoned = self._jobs.get(one if isinstance(one, int) else one.request_id)
            if abandoned is not None:
                abandoned.give("", None, "cancelled")
                self._end(abandoned)
            self._abandoned.popleft()
        self._tell_lost()
        self._unsettled = False

    def _recover(self) -> None:
        """Finish what an exception has cut short. May be cut short itself: the next call begins it again."""
        self._unsettled = True
        for job in self._jobs.values():
            slot = self._scheduler.slot_of(job.request.request_id) if job.over else None
            if slot is not None:
                self._runner.release(slot)
        self._jobs = {number: job for number, job in self._jobs.items() if not job.over}
        self._scheduler.recover([job.request for job in self._jobs.values()])
        if self._unfinished is not None:
            self._deliver(self._unfinished, again=True)
            self._unfinished = None
        self._unsettled = False

    def _plan(self) -> list[Work]:
        self._unsettled = True
        work = self._scheduler.plan()
        now = time.perf_counter()
        for item in work:
            if not item.decode:  # each begins with a piece of its prompt
                job = self._jobs[item.sequence.request_id]
                if job.started is None:
                    job.cached_tokens, job.started = item.sequence.cached_tokens, now
        self._unsettled = False
        return work

    def _run(self, work: list[Work]) -> DoneStep:
        """Move pages, then feed the work of all sequences that this did not fail for. Commits nothing."""
        if self._scheduler.actions:
            self._moves.carry_out(self._scheduler.actions, self._jobs)
            if self._moves.lost:
                self._settle()
                work = [item for item in work if item.sequence.request_id in self._jobs]
        batch = [item for item in work if not item.score]
        found = self._runner.step(batch) if batch else []
        if len(batch) == len(work):  # mostly
            return DoneStep(work, list(found))
        samples = iter(found)
        return DoneStep(work, [self._runner.score(item) if item.score else next(samples) for item in work])

    def _tell_lost(self) -> None:
        """End the requests whose pages or states could not be moved."""
        if self._scheduler.actions:
            return  # one of them may read an entry of the pool that was not written
        while self._moves.lost:
            action, error = self._moves.lost[-1]
            job = self._jobs.get(action.request_id)
            if isinstance(action, SaveCheckpoint):
                self._scheduler.drop_checkpoint(action)
                log.warning("a state could not be kept for later prompts: %s", error)
            elif job is not None:
                self._end(job, copy_error(error))
            self._moves.lost.pop()

    def _fail(self, work: list[Work], error: Exception) -> None:
        """End the requests of a step that failed."""
        self._unsettled = True
        for item in work:
            job = self._jobs.get(item.sequence.request_id)
            if job is not None:
                self._end(job, copy_error(error))
        self._unsettled = False

    def _deliver(self, step: DoneStep, *, again: bool = False) -> None:
        deliver(step, self._jobs, self._scheduler, self._forced, self._failures, self._end, again=again)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Forget a job that is over. In this order: a slot that is free may be used by others at once."""
        request_id = job.request.request_id
        if error is not None:
            job.error = error
        slot = self._scheduler.slot_of(request_id)
        if slot is not None:
            self._runner.release(slot)
        self._scheduler.remove(request_id)
        self._jobs.pop(request_id, None)
