"""One request as its caller sees it: an iterator over chunks that folds into a result.

The whole result is made of the chunks and of nothing else, so streamed and whole results cannot differ. The chunks are
those of the job; a stream only knows how many of them its caller has got. A call that an exception ends takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from engine.concurrency.turn import Hold, Turn
from engine.request import GenerationResult, StreamChunk
from engine.scheduling.job import Job
from engine.scheduling.loop import EngineLoop
from engine.text import AnswerReader


class Stream:
    """A running request. Iterate over it for chunks, or call result() for the whole.

    Closing it, leaving its `with` block, or forgetting it ends the request and frees its place. Several threads may
    use it; each chunk goes to one of them.

    Args:
        loop: where the job runs.
        job: the job, not yet submitted.
        make_reader: gives readers that take the text of a chat's answer apart; None where it has no structure.
    """

    def __init__(self, loop: EngineLoop, job: Job, make_reader: Callable[[], AnswerReader] | None = None) -> None:
        self._loop = loop
        self._job = job
        self._make_reader = make_reader
        self._reader: AnswerReader | None = None
        self._n_read = -1  # chunks that the reader has read; -1 while it reads one
        self._chunks = job.chunks if make_reader is None else []  # as callers get them
        self._n = 0  # chunks that callers have got
        self._told = False  # the error of the job has been raised
        self._closed = False
        self._turn = Turn()
        loop.submit([job], owner=self)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """The next chunk; drives the engine while it is not there.

        Raises:
            EngineError: a step of this request failed, or the model was closed.
        """
        hold, n = Hold(), -1
        try:
            chunk = None if self._closed else self._next(hold)
            if chunk is None or self._closed:
                raise StopIteration
            n = self._n
            self._n, hold.released = n + 1, True
            if self._turn.bells:
                self._turn.ring()
            return chunk
        except BaseException as error:
            if n >= 0 and self._n == n + 1:
                self._n = n  # the caller did not get it
            if error is self._job.error:
                self._told = True
            self._turn.release(hold)
            raise

    def _next(self, hold: Hold) -> StreamChunk | None:
        """The next chunk, not yet taken, with the turn; None after the last one."""
        self._turn.wait(hold)
        job, n = self._job, self._n
        if self._told or (n and job.chunks[n - 1].finish_reason is not None):
            return None
        self._loop.wait_for(job, n)
        if len(job.chunks) <= n:
            assert job.error is not None, "waited for a chunk that is not there"
            raise job.error
        if self._make_reader is not None:
            self._read_to(n, self._make_reader)
        return self._chunks[n]

    def _read_to(self, n: int, make_reader: Callable[[], AnswerReader]) -> None:
        """Take chunk n apart, those before it having been."""
        if len(self._chunks) > n:
            return
        reader = self._reader
        if reader is None or self._n_read != n:  # an exception cut it short: begin again
            reader = make_reader()
            for chunk in self._job.chunks[:n]:
                reader.read(chunk)
        self._reader, self._n_read = reader, -1
        read = reader.read(self._job.chunks[n])
        self._chunks[n:] = [read]
        self._n_read = n + 1

    @property
    def text(self) -> str:
        """The text so far; of a chat, the answer without reasoning and calls."""
        return "".join([chunk.text for chunk in self._chunks[: self._n]])

    def result(self) -> GenerationResult:
        """Run to the end and fold all chunks, those already fetched included; of a closed stream, what there was.

        Raises:
            EngineError: a step of this request failed; `text` holds what there was.
        """
        hold = Hold()
        try:
            while self._next(hold) is not None:
                self._n += 1
                self._turn.release(hold)
                hold = Hold()
        finally:
            self._turn.release(hold)
        if self._job.error is not None:
            raise self._job.error
        request, chunks = self._job.request, self._chunks[: self._n]
        assert chunks, "a stream without an error has a last chunk"
        last, scores = chunks[-1], chunks[0].prompt_logprobs
        assert last.finish_reason is not None, "the last chunk says why"
        assert last.stats is not None, "the last chunk has the statistics"
        return GenerationResult(
            text="".join([chunk.text for chunk in chunks]),
            token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
            finish_reason=last.finish_reason,
            prompt_token_ids=list(request.prompt_ids),
            seed=request.seed,
            stats=last.stats,
            logprobs=[one for chunk in chunks for one in chunk.logprobs]
            if request.params.logprobs is not None
            else None,
            prompt_logprobs=None if scores is None else list(scores),
            reasoning="".join([chunk.reasoning for chunk in chunks]),
            tool_calls=tuple([call for chunk in chunks for call in chunk.tool_calls]),
            text_with_calls=self._reader.text_with_calls if self._reader is not None else None,
        )

    def cancel(self) -> None:
        """End the request; the chunks there are and a last one with finish_reason "cancelled" can still be fetched."""
        if not self._job.over:
            self._loop.cancel(self._job.request.request_id)

    def close(self) -> None:
        """End the request and the iteration; result() still gives what there was."""
        self._closed = True
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
