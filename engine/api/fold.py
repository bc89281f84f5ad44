"""Chunks of one request → its whole result. The only way to a result, so streamed and whole texts cannot differ."""

from __future__ import annotations

from collections.abc import Sequence

from engine.request import GenerationResult, GenerationStats, Request, StreamChunk, TokenSample, ToolCall
from engine.text import AnswerReader


class Fold:
    """What the chunks of a request have brought so far.

    Args:
        request: the request that the chunks belong to.
        reader: takes the text of a chat's answer apart; None leaves it as it is.

    Attributes:
        finish_reason: see GenerationResult; None before the last chunk.
    """

    def __init__(self, request: Request, reader: AnswerReader | None = None) -> None:
        self._request = request
        self._reader = reader
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[ToolCall] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenSample] = []
        self._prompt_logprobs: list[TokenSample | None] | None = None
        self.finish_reason: str | None = None
        self._stats: GenerationStats | None = None

    def add(self, chunk: StreamChunk) -> StreamChunk:
        """Take the next chunk; returns it as the caller is to see it, with reasoning and calls taken apart."""
        if self._reader is not None:
            chunk = self._reader.read(chunk)
            self._reasoning.append(chunk.reasoning)
            self._tool_calls.extend(chunk.tool_calls)
        self._texts.append(chunk.text)
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = list(chunk.prompt_logprobs)
        if chunk.finish_reason is not None:
            self.finish_reason, self._stats = chunk.finish_reason, chunk.stats
        return chunk

    @property
    def text(self) -> str:
        """The text so far; of a chat, the answer without reasoning and calls."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """Of a chat, what the model has thought so far."""
        return "".join(self._reasoning)

    @property
    def n_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    def result(self) -> GenerationResult:
        """The whole, after the last chunk."""
        assert self.finish_reason is not None, "a stream without an error has a last chunk"
        assert self._stats is not None, "the last chunk has the statistics"
        request = self._request
        return GenerationResult(
            text=self.text,
            token_ids=list(self._token_ids),
            finish_reason=self.finish_reason,
            prompt_token_ids=list(request.prompt_ids),
            seed=request.seed,
            stats=self._stats,
            logprobs=list(self._logprobs) if request.params.logprobs is not None else None,
            prompt_logprobs=None if self._prompt_logprobs is None else list(self._prompt_logprobs),
            reasoning=self.reasoning,
            tool_calls=tuple(self._tool_calls),
            text_with_calls=self._reader.text_with_calls if self._reader is not None else None,
        )


def merged(chunks: Sequence[StreamChunk]) -> StreamChunk:
    """Successive chunks of one request, at least one, as one chunk with the same text, tokens and end."""
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    return StreamChunk(
        text="".join([chunk.text for chunk in chunks]),
        token_ids=tuple([token_id for chunk in chunks for token_id in chunk.token_ids]),
        finish_reason=last.finish_reason,
        logprobs=tuple([sample for chunk in chunks for sample in chunk.logprobs]),
        prompt_logprobs=next((one.prompt_logprobs for one in chunks if one.prompt_logprobs is not None), None),
        stats=last.stats,
        request_id=last.request_id,
    )
