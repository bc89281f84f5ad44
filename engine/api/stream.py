"""One request as its caller sees it: an iterator over chunks that folds into a result.

The whole result is made of the chunks and of nothing else, so streamed and whole results cannot differ. The chunks are
those of the job; a stream only knows how many of them its caller has got. A call that an exception ends takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from engine.api.fold import Fold
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
        make_reader: gives readers that take the text of a chat's answer apart, or None where it has no structure.
    """

    def __init__(
        self, loop: EngineLoop, job: Job, make_reader: Callable[[], AnswerReader | None] = lambda: None
    ) -> None:
        self._loop = loop
        self._job = job
        self._make_reader = make_reader
        self._reader = make_reader()
        self._n_read = 0  # chunks that the reader has read; -1 while it reads one
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
        return self._read(n)

    def _read(self, n: int) -> StreamChunk:
        """Chunk n as callers see it."""
        if self._reader is None:
            return self._job.chunks[n]
        if self._n_read != n:  # cut short by an exception, or read for a caller who did not get it: begin again
            reader = self._make_reader()
            assert reader is not None, "the same kind of reader each time"
            for chunk in self._job.chunks[:n]:
                reader.read(chunk)
            self._reader = reader
        self._n_read = -1
        chunk = self._reader.read(self._job.chunks[n])
        self._n_read = n + 1
        return chunk

    def _folded(self) -> Fold:
        """What callers have got."""
        fold = Fold(self._job.request, self._make_reader())
        for chunk in self._job.chunks[: self._n]:
            fold.add(chunk)
        return fold

    @property
    def text(self) -> str:
        """The text so far; of a chat, the answer without reasoning and calls."""
        return self._folded().text

    def result(self) -> GenerationResult:
        """Run to the end and fold all chunks, those already fetched included; of a closed stream, what there was.

        Raises:
            EngineError: a step of this request failed; `text` holds what there was.
        """
        job = self._job
        while True:
            n = len(job.chunks)
            if job.over:  # asked after the number was taken: else there will be a chunk of that number
                break
            self._loop.wait_for(job, n)
        self._n = len(job.chunks)  # nothing is left to iterate over
        if job.error is not None:
            self._told = True
            raise job.error
        return self._folded().result()

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
