"""A request on its way through the loop: what it has given so far, and what a preemption saved of it.

Chunks are only ever appended, and appending one is the statement that makes a token count as given. Readers keep their
own place in the list, so reading changes nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from engine.request import GenerationStats, Request, StreamChunk, TokenSample, Work
from engine.scheduling.chunks import Chunks
from engine.scheduling.output import OutputAssembler


class Owner(ref[Any]):
    """A weak reference to what a caller holds of a request; when that has been forgotten, the request is given up."""

    request_id = -1  # until it is set: no request


@dataclass(eq=False)
class Job:
    """A request, with the chunks that it has given and times in seconds.

    Attributes:
        request: the request.
        assembler: makes text of its tokens.
        by_step: its chunks are given by EngineLoop.step().
        chunks: all chunks so far, one per token.
        error: what ended it, where that was a failure.
        prompt_scores: of the prompt's tokens from request.score_from on.
        cached_tokens: prompt tokens that the cache held when it started.
        saved, saved_state: its pages and recurrent state while it is preempted.
        owner: of a request without by_step.
    """

    request: Request
    assembler: OutputAssembler
    by_step: bool = False
    error: Exception | None = None
    prompt_scores: list[TokenSample] = field(default_factory=list)
    cached_tokens: int = 0
    saved: Any = None
    saved_state: Any = None
    owner: Owner | None = None
    submitted: float = 0.0
    started: float | None = None
    first: float | None = None
    last: float = 0.0
    chunks: Chunks = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.chunks = Chunks(request.request_id)
        self._plain = request.params.logprobs is None and request.score_from is None

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or self.chunks.ended

    def has(self, n: int) -> bool:
        """Whether there is a chunk number n, or there never will be."""
        return len(self.chunks) > n or self.error is not None

    def keep_scores(self, work: Work, scores: list[TokenSample]) -> None:
        """Scores that a work item gave; keeping them twice changes nothing."""
        first = work.start + 1 - (self.request.score_from or 0)
        self.prompt_scores[first : first + len(scores)] = scores

    def give(self, text: str, sample: TokenSample | None, finish: str | None) -> None:
        """Append a chunk; prompt scores go with the first one."""
        request = self.request
        scores: tuple[TokenSample | None, ...] | None = None
        first = request.score_from
        if first is not None and not self.chunks and len(self.prompt_scores) == len(request.prompt_ids) - first:
            scores = (*[None] * first, *self.prompt_scores)
        self.chunks.given.append(
            StreamChunk(
                text=text,
                token_ids=() if sample is None else (sample.token_id,),
                finish_reason=finish,
                logprobs=() if sample is None or request.params.logprobs is None else (sample,),
                prompt_logprobs=scores,
                stats=self._stats(sample is not None) if finish is not None else None,
                request_id=request.request_id,
            )
        )

    def take(self, sample: TokenSample, now: float, *, again: bool) -> str | None:
        """Make a chunk of a token drawn; returns why the text ends with it, if it does.

        Args:
            sample: the token.
            now: the time.
            again: an earlier call may have been cut short by an exception, the assembler in the middle of the token.
        """
        if again and self.assembler.n_pushed != len(self.chunks):
            self.assembler = self.assembler.begun_again(self.chunks.token_ids)
        if self.first is None:
            self.first = now
        text, finish = self.assembler.push(sample)
        if self._plain and finish is None:  # mostly
            self.chunks.given.append((text, sample.token_id))
        else:
            self.give(text, sample, finish)
        return finish

    def _stats(self, one_more: bool) -> GenerationStats:
        """Counts and times, perhaps with one token more than in the chunks."""
        started = self.started if self.started is not None else self.submitted
        first = self.first if self.first is not None else self.last
        return GenerationStats(
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=len(self.chunks.token_ids) + one_more,
            queue_seconds=max(started - self.submitted, 0.0),
            prompt_seconds=max(first - started, 0.0),
            decode_seconds=max(self.last - first, 0.0),
            cached_tokens=self.cached_tokens,
        )
