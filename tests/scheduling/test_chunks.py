"""Chunks of a request are the same however they are read, and leave nothing for the garbage collector to follow."""

import gc

import pytest

from engine.request import Request, StreamChunk, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.job import Job
from engine.scheduling.output import OutputAssembler


def job_of(n, **params):
    request = Request(7, [1, 2, 3], SamplingParams(**params), 0, n)
    return Job(request, OutputAssembler(request, None, ()))


@pytest.mark.parametrize("logprobs", [None, 0])
def test_every_way_of_reading_gives_the_same_chunks(logprobs):
    job, want = job_of(5, logprobs=logprobs), []
    for token in range(5):
        sample = TokenSample(token, None if logprobs is None else -0.5)
        finish = job.take(sample, 0.0, again=False)
        assert (finish is None) == (token < 4)
        shown = () if logprobs is None else (sample,)
        want.append(StreamChunk("", (token,), finish, shown, None, job.chunks[token].stats, 7))
        assert job.over == (finish is not None)
    told = []
    assert job.chunks.tell(0, told) == 5
    for first in range(1, 6):
        assert job.chunks.tell(first, part := []) == 5
        assert part == want[first:]
    assert told == want == list(job.chunks) == job.chunks[:] == [job.chunks[i] for i in range(5)]
    assert job.chunks.token_ids == [0, 1, 2, 3, 4]
    assert want[-1].stats.output_tokens == 5


def test_tokens_are_nothing_that_the_collector_follows():
    job = job_of(1000)
    for token in range(999):
        job.take(TokenSample(token), 0.0, again=False)
    gc.collect()
    assert not any(gc.is_tracked(one) for one in job.chunks.given)
