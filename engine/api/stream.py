"""One request as its caller sees it: an iterator over chunks that folds into a result.

The whole result is made of the chunks and of nothing else, so streamed and whole results cannot differ.
"""

from __future__ import annotations

import threading
from types import TracebackType

from engine.api.fold import Fold
from engine.request import GenerationResult, StreamChunk
from engine.scheduling.loop import EngineLoop, Job
from engine.text import AnswerReader


class Stream:
    """A running request. Iterate over it for chunks, or call result() for the whole.

    Closing it, leaving its `with` block, or forgetting it ends the request and frees its place. Several threads may
    use it; each chunk goes to one of them.

    Args:
        loop: where the job runs.
        job: the job, not yet submitted.
        reader: takes the text of a chat's answer apart.
    """

    def __init__(self, loop: EngineLoop, job: Job, reader: AnswerReader | None = None) -> None:
        self._loop = loop
        self._job = job
        self._fold = Fold(job.request, reader)
        self._read: StreamChunk | None = None  # the last chunk as its reader gave it
        self._ended = False
        self._closed = False
        self._fetching = threading.Lock()
        loop.submit([job])

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """The next chunk; drives the engine while it is not there.

        Raises:
            EngineError: a step of this request failed, or the model was closed.
        """
        chunk = None if self._closed else self._fetch()
        if chunk is None or self._closed:
            raise StopIteration
        return chunk

    def _fetch(self, *, every: bool = False) -> StreamChunk | None:
        """The next chunk, or every one there is, folded into what there was; None after the last one."""
        with self._fetching:
            if self._ended:
                return None
            try:
                self._loop.next_chunk(self._job, self._take, every=every)
                return self._read
            except Exception:
                self._ended = True
                raise

    def _take(self, chunk: StreamChunk) -> None:
        self._read = self._fold.add(chunk)
        self._ended = chunk.finish_reason is not None

    @property
    def text(self) -> str:
        """The text so far; of a chat, the answer without reasoning and calls."""
        return self._fold.text

    def result(self) -> GenerationResult:
        """Run to the end and fold all chunks, those already fetched included; of a closed stream, what there was.

        Raises:
            EngineError: a step of this request failed; `text` holds what there was.
        """
        while self._fetch(every=True) is not None:
            pass
        if self._job.error is not None:
            raise self._job.error
        return self._fold.result()

    def cancel(self) -> None:
        """End the request; the chunks there are and a last one with finish_reason "cancelled" can still be fetched."""
        if not self._ended:
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

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._loop.cancel(self._job.request.request_id)
