"""Commits a step: what the runner returned goes to the scheduler, and as chunks to the jobs.

An exception may arrive between any two lines (docs/decisions/exceptions-at-any-line.md): the same step can be
delivered again, and items that were committed are passed over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from engine.errors import EngineError
from engine.request import TokenSample, Work
from engine.scheduling.failures import Failures
from engine.scheduling.forced import ForcedTokens
from engine.scheduling.job import Job
from engine.scheduling.pieces import outputs_before
from engine.scheduling.scheduler import Scheduler

StepResult = TokenSample | EngineError | list[TokenSample] | None
"""Of one work item: the token drawn, why none could be, the scores of prompt tokens, or nothing."""


class DoneStep(NamedTuple):
    """Work items that the runner has fed, and its result of each."""

    work: list[Work]
    results: list[StepResult]


class EndJob(Protocol):
    """How a job that is over leaves the loop, with what ended it where that was a failure."""

    def __call__(self, job: Job, error: Exception | None = None) -> None:
        """Forget the job."""


def deliver(
    step: DoneStep,
    jobs: Mapping[int, Job],
    scheduler: Scheduler,
    forced: ForcedTokens,
    failures: Failures,
    end: EndJob,
    *,
    again: bool = False,
) -> None:
    """Commit a step item by item.

    Args:
        step: the step.
        jobs: those that have not ended, by request.
        scheduler: that planned the work.
        forced: says which tokens follow a drawn one.
        failures: tells exceptions of the engine's own code from those that were raised from outside.
        end: called with each job that is over.
        again: perhaps a part of the step was committed before.
    """
    now = time.perf_counter()
    for item, result in zip(step.work, step.results, strict=True):
        sequence = item.sequence
        job = jobs.get(sequence.request_id)
        if job is None:
            continue
        job.last = now
        sample: TokenSample | None = None
        if isinstance(result, TokenSample):
            sample = result
        elif isinstance(result, EngineError):
            end(job, result)
            continue
        elif result is not None:
            job.keep_scores(item, result)
        try:  # one request's constraint or text must not end its neighbours
            if not again or sequence.n_cached == item.start:
                behind = () if sample is None or sequence.mask is None else forced.behind(job, item, sample)
                scheduler.commit(item, sample, forced=behind)
            if sample is None:
                finish = None
            elif again or sequence.mask is not None:
                finish = _take(job, item, sample, forced, now, again=again)
            else:  # mostly
                finish = job.take(sample, now, again=False)
        except Exception as error:
            if not failures.is_own(error):
                raise
            end(job, error)
            continue
        if finish is not None:
            end(job)
        if sample is None and job.request.max_output == 0 and scheduler.is_scored(sequence.request_id):
            job.give("", None, "length")
            end(job)


def _take(job: Job, item: Work, sample: TokenSample, forced: ForcedTokens, now: float, *, again: bool) -> str | None:
    """Give a job the token that an item drew, and what the commit put behind it; those that it has are passed over."""
    before, ids = outputs_before(item), item.sequence.output_ids
    if not again and len(ids) == before + 1:  # mostly
        return job.take(sample, now, again=False)
    for index in range(max(before, len(job.chunks)), len(ids)):
        one = sample if index == before else forced.sample_of(ids[index], job.request.params)
        finish = job.take(one, now, again=again)
        if finish is not None:
            return finish
    return None
