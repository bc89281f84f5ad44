"""One request as its caller sees it: an iterator over chunks that folds into a result.

The whole result is made of the chunks and of nothing else, so streamed and whole results cannot differ.
"""

from __future__ import annotations

import threading
from types import TracebackType

from engine.request import GenerationResult, GenerationStats, StreamChunk, TokenSample, ToolCall
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
        self._reader = reader
        self._read: StreamChunk | None = None  # the last chunk as its reader gave it
        self._reasoning: list[str] = []
        self._tool_calls: list[ToolCall] = []
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenSample] = []
        self._prompt_logprobs: list[TokenSample | None] | None = None
        self._finish_reason: str | None = None
        self._stats: GenerationStats | None = None
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
                chunk = self._loop.next_chunk(self._job, self._fold, every=every)
                return chunk if self._reader is None else self._read
            except Exception:
                self._ended = True
                raise

    def _fold(self, chunk: StreamChunk) -> None:
        if self._reader is not None:
            chunk = self._read = self._reader.read(chunk)
            self._reasoning.append(chunk.reasoning)
            self._tool_calls.extend(chunk.tool_calls)
        self._texts.append(chunk.text)
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = list(chunk.prompt_logprobs)
        if chunk.finish_reason is not None:
            self._finish_reason, self._stats, self._ended = chunk.finish_reason, chunk.stats, True

    @property
    def text(self) -> str:
        """The text so far; of a chat, the answer without reasoning and calls."""
        return "".join(self._texts)

    def result(self) -> GenerationResult:
        """Run to the end and fold all chunks, those already fetched included; of a closed stream, what there was.

        Raises:
            EngineError: a step of this request failed; `text` holds what there was.
        """
        while self._fetch(every=True) is not None:
            pass
        if self._job.error is not None:
            raise self._job.error
        request = self._job.request
        assert self._finish_reason is not None, "a stream without an error has a last chunk"
        assert self._stats is not None, "the last chunk has the statistics"
        return GenerationResult(
            text=self.text,
            token_ids=list(self._token_ids),
            finish_reason=self._finish_reason,
            prompt_token_ids=list(request.prompt_ids),
            seed=request.seed,
            stats=self._stats,
            logprobs=list(self._logprobs) if request.params.logprobs is not None else None,
            prompt_logprobs=None if self._prompt_logprobs is None else list(self._prompt_logprobs),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(self._tool_calls),
            text_with_calls=self._reader.text_with_calls if self._reader is not None else None,
        )

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
