"""The facade for asyncio: the calls of LLM as coroutines and asynchronous iterators. Knows no HTTP.

All requests share the batch of one LLM, which a thread of its own steps (driver.py). Text is turned into tokens, and
conversations into prompts, in threads of the pool where they are long, so that they do not stop the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.api.asynchronous.driver import Driver
from engine.api.asynchronous.mailbox import News, PromptProgress
from engine.api.chats import Message
from engine.api.embedding.embeddings import EmbeddingRequest, RankedDocument
from engine.api.fold import Fold, merged
from engine.api.llm import LLM
from engine.api.prompts import Prompt
from engine.errors import DeviceError, InvalidRequestError
from engine.request import GenerationResult, Request, StreamChunk
from engine.sampling.params import SamplingParams
from engine.text import AnswerReader, ChatPrompt

if TYPE_CHECKING:
    import numpy as np

Given = Prompt | ChatPrompt
"""What can be continued: text, token ids, or a conversation that LLM.chat_prompt() has rendered."""

_SHORT = 2048


def is_short(prompt: Given) -> bool:
    """Whether checking a prompt, of a text its tokens too, takes less time than the way to a thread and back."""
    if isinstance(prompt, ChatPrompt):
        return len(prompt.token_ids) <= _SHORT
    return isinstance(prompt, (str, list, tuple)) and len(prompt) <= _SHORT  # what else it may be is checked elsewhere


class Inbox:
    """What has arrived for one stream. The driver holds it, not the stream, which may be forgotten while it runs."""

    def __init__(self) -> None:
        self.news: deque[StreamChunk | Exception] = deque()
        self.progress: deque[PromptProgress] = deque()
        self.arrived = asyncio.Event()
        self.told = False  # the end is there

    def receive(self, news: News) -> None:
        """The next news."""
        if isinstance(news, PromptProgress):
            self.progress.append(news)
            return
        self.news.append(news)
        self.told = self.told or isinstance(news, Exception) or news.finish_reason is not None

    def wake(self) -> None:
        """After the news of one delivery."""
        self.arrived.set()


class AsyncStream:
    """A running request. Iterate over it with `async for`, or await result() for the whole.

    Chunks that have arrived together are given as one, except where they have log-probabilities. Closing it, leaving
    its `async with` block, cancelling the task that waits for result(), or forgetting it ends the request and frees its
    place. Use it in one task at a time.

    Args:
        driver: runs the request.
        request: what runs.
        inbox: where its chunks arrive.
        reader: takes the text of a chat's answer apart.

    Attributes:
        request: what runs: its id, the prompt's token ids, its parameters and seed.
    """

    def __init__(self, driver: Driver, request: Request, inbox: Inbox, reader: AnswerReader | None) -> None:
        self.request = request
        self._driver = driver
        self._inbox = inbox
        self._fold = Fold(request, reader)
        self._error: Exception | None = None
        self._ended = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        """All that has come since the last call, as one chunk; waits while that is nothing.

        Raises:
            EngineError: a step of this request failed, or the model was closed.
        """
        if self._ended:
            raise StopAsyncIteration
        inbox = self._inbox
        while not inbox.news:
            inbox.arrived.clear()
            await inbox.arrived.wait()
        chunks: list[StreamChunk] = []
        while inbox.news:
            news = inbox.news[0]
            if isinstance(news, Exception):
                break
            chunks.append(news)
            inbox.news.popleft()
            if news.logprobs:  # its text and its log-probabilities belong together
                break
        if not chunks:
            self._ended, self._error = True, inbox.news.popleft()  # type: ignore[assignment]
            raise self._error  # type: ignore[misc]
        chunk = self._fold.add(merged(chunks))
        self._ended = chunk.finish_reason is not None
        return chunk

    async def prompt_progress(self) -> AsyncIterator[PromptProgress]:
        """How the prompt is read, step by step, until the first chunk is there; for streams made with watched=True."""
        inbox = self._inbox
        while True:
            while inbox.progress:
                yield inbox.progress.popleft()
            if inbox.news:
                return
            inbox.arrived.clear()
            await inbox.arrived.wait()

    async def result(self) -> GenerationResult:
        """Wait for the end; returns the whole, chunks that were fetched before included.

        Raises:
            EngineError: a step of this request failed; `text` holds what there was.
        """
        try:
            async for _ in self:
                pass
        finally:
            self.cancel()
        return self.folded()

    def folded(self) -> GenerationResult:
        """The whole, after the last chunk was fetched.

        Raises:
            EngineError: a step of this request failed; `text` holds what there was.
        """
        if self._error is not None:
            raise self._error
        return self._fold.result()

    @property
    def text(self) -> str:
        """The text so far; of a chat, the answer without reasoning and calls."""
        return self._fold.text

    @property
    def reasoning(self) -> str:
        """Of a chat, what the model has thought so far."""
        return self._fold.reasoning

    @property
    def n_tokens(self) -> int:
        """Tokens fetched so far."""
        return self._fold.n_tokens

    @property
    def finish_reason(self) -> str | None:
        """See GenerationResult; None before the last chunk was fetched."""
        return self._fold.finish_reason

    def cancel(self) -> None:
        """End the request before the next step; what there is and a last chunk "cancelled" can still be fetched."""
        if not self._inbox.told:
            self._driver.cancel(self.request.request_id)

    async def aclose(self) -> None:
        """End the request and the iteration."""
        self.cancel()
        self._ended = True

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_inbox"):
            self.cancel()


class AsyncLLM:
    """An open model for asyncio programs. Use it as an asynchronous context manager, or await aclose().

    Args:
        llm: the open model, which this object closes. Its own methods may be used beside those of this object, from
            threads (`asyncio.to_thread(async_llm.llm.perplexity, text)`).
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._driver = Driver(llm)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End all requests and close the model; a second call does nothing."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """aclose() for a thread that may wait for the running step."""
        self._driver.close()
        self.llm.close()

    @property
    def failure(self) -> DeviceError | None:
        """The error of the last step where the device failed in it; None once a step has worked again."""
        return self._driver.failure

    @property
    def n_steps(self) -> int:
        """Steps so far that gave tokens."""
        return self._driver.n_steps

    @property
    def n_tokens(self) -> int:
        """Tokens that these steps gave."""
        return self._driver.n_tokens

    @property
    def n_requests(self) -> int:
        """Requests made here that have not ended."""
        return self._driver.n_requests

    async def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> ChatPrompt:
        """See LLM.chat_prompt."""
        return await asyncio.to_thread(lambda: self.llm.chat_prompt(messages, **variables))

    async def streams(
        self, prompt: Given, params: SamplingParams | None = None, *, watched: bool = False
    ) -> list[AsyncStream]:
        """The params.n samples of a prompt, each a stream; they run side by side and share the prompt's pages.

        Args:
            prompt: text, token ids, or what chat_prompt() gives.
            params: sampling parameters.
            watched: the first stream's prompt_progress() tells how the prompt is read.

        Raises:
            InvalidRequestError, ContextFullError: refused, before anything ran.
        """
        params = params or SamplingParams()
        chat = prompt if isinstance(prompt, ChatPrompt) else None
        constrained = params.constraint is not None
        mailbox = self._driver.mailbox(asyncio.get_running_loop())
        inboxes = [Inbox() for _ in range(params.n)]

        def add() -> list[AsyncStream]:
            # Outside the driver's lock: a large grammar takes long to compile, and steps need the lock.
            jobs = self.llm.jobs(prompt, params)
            requests = self._driver.add(jobs, inboxes, mailbox, watched=watched)
            return [
                AsyncStream(self._driver, request, inbox, chat.reader(constrained=constrained) if chat else None)
                for request, inbox in zip(requests, inboxes, strict=True)
            ]

        if not constrained and is_short(prompt):
            return add()
        # A cancelled task does not stop the thread; the streams that it returns are then forgotten, which ends them.
        return await asyncio.to_thread(add)

    async def stream(self, prompt: Given, params: SamplingParams | None = None) -> AsyncStream:
        """Complete one prompt, chunk by chunk as the tokens come: `async for chunk in await llm.stream(...)`.

        Raises:
            InvalidRequestError, ContextFullError: refused, before anything ran.
        """
        if params is not None and params.n != 1:
            raise InvalidRequestError(f"n is {params.n}; a stream gives one sample: use generate() or streams()")
        return (await self.streams(prompt, params))[0]

    async def generate(self, prompt: Given, params: SamplingParams | None = None) -> GenerationResult:
        """Complete one prompt. With params.n above 1 the result's attribute `samples` holds all samples.

        Cancelling the task that awaits it ends the request.

        Raises:
            InvalidRequestError, ContextFullError: refused, before anything ran.
            EngineError: a step of the request failed.
        """
        streams = await self.streams(prompt, params)
        try:
            samples = tuple([await stream.result() for stream in streams])
        finally:
            for stream in streams:
                stream.cancel()
        return samples[0].copy(samples=samples) if len(samples) > 1 else samples[0]

    async def embed(self, texts: Any, **settings: Any) -> Any:
        """LLM.embed() for asyncio; cancelling the task ends it after the batch that runs."""
        embeddings = self.llm.embeddings
        request = await asyncio.to_thread(lambda: embeddings.request(texts, **settings))
        return embeddings.together(request, await self.run_embedding(request))

    async def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[RankedDocument]:
        """LLM.rerank() for asyncio."""
        request = await asyncio.to_thread(self.llm.embeddings.ranking, query, documents, top_n)
        return request.ranked(await self.run_embedding(request))

    async def run_embedding(self, request: EmbeddingRequest) -> list[np.ndarray]:
        """The result of each text of a request that LLM.embeddings has checked.

        Batches run in threads of the pool between two steps of the driver; requests of several tasks share them.
        """
        given_up = threading.Event()
        try:
            return await asyncio.to_thread(self.llm.embeddings.run, request, given_up.is_set)
        finally:
            given_up.set()

    async def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> AsyncStream:
        """LLM.stream_chat() for asyncio."""
        return await self.stream(await self.chat_prompt(messages, **variables), params)

    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> GenerationResult:
        """LLM.chat() for asyncio."""
        return await self.generate(await self.chat_prompt(messages, **variables), params)
