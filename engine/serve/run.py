"""One request's generation: its place in the queue, its sequences, its deadline, and its end however it comes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.api.asynchronous.async_llm import AsyncLLM, AsyncStream, Given, is_short
from engine.api.asynchronous.mailbox import PromptProgress
from engine.api.embedding.embeddings import Asked
from engine.api.llm import LLM
from engine.errors import ConstraintError, ContextFullError
from engine.request import GenerationResult, GenerationStats, StreamChunk
from engine.sampling.params import SamplingParams
from engine.serve.errors import ApiError
from engine.serve.models.model_store import ServedModel
from engine.serve.serving import Serving
from engine.text import ChatPrompt

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Told:
    """A chunk, and to which of the request's sequences it belongs."""

    index: int
    chunk: StreamChunk


class Run:
    """A request that generates; used as an asynchronous context manager around all of its answer.

    Args:
        serving: the server.
        name: the model that the client named.
        timeout: seconds that the client gives it; None: the server's deadline.

    Attributes:
        model: the model, once entered.
        streams: the sequences, once started.
    """

    model: ServedModel

    def __init__(self, serving: Serving, name: str | None, timeout: float | None = None) -> None:
        self._serving = serving
        self._name = name
        limits = [one for one in (timeout, serving.settings.deadline) if one is not None]
        self._limit = min(limits) if limits else None
        self._begun = time.perf_counter()
        self._reserved = 0
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._entered = False
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.streams: list[AsyncStream] = []

    async def __aenter__(self) -> Run:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def is_ready(self) -> bool:
        """Whether open() has nothing to wait for."""
        return self._serving.store.is_open(self._name)

    @property
    def llm(self) -> AsyncLLM:
        """The open model."""
        return self.model.open_llm

    async def open(self) -> None:
        """Wait for the model.

        Raises:
            ApiError: no such model, it cannot be opened, or the deadline is over.
        """
        try:
            async with asyncio.timeout(self._limit):
                self.model = await self._serving.store.acquire(self._name)
                self._entered = True
        except TimeoutError:
            raise self._too_late() from None

    async def start(
        self, prompts: Sequence[Given], params: SamplingParams, *, watched: bool = False, field: str | None = None
    ) -> None:
        """Queue all samples of all prompts, sequence i being sample i % n of prompt i // n.

        Args:
            prompts: what is continued.
            params: for all of them.
            watched: events() can tell how the first prompt is read.
            field: of the request, which says what the answer has to be.

        Raises:
            ApiError: 429 where too many requests wait; 400 where the answer cannot be what that field says.
            InvalidRequestError, ContextFullError: refused before anything ran.
        """
        self._reserve(len(prompts) * params.n)
        if self._limit is not None:
            left = self._begun + self._limit - time.perf_counter()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._expire)
        for prompt in prompts:
            ids = prompt if isinstance(prompt, ChatPrompt) else await self._ids(prompt)
            watched = watched and not self.streams
            try:
                self.streams += await self.llm.streams(ids, self._fitting(ids, params), watched=watched)
            except ConstraintError as error:
                raise ApiError(400, f"{field}: {error}", param=field, code="invalid_value") from None
            if self._expired:
                raise self._too_late()

    async def embed(self, make: Callable[[LLM], Asked]) -> tuple[Asked, list[np.ndarray]]:
        """Run a request for embeddings or scores, which takes one place of the queue.

        Args:
            make: checks the texts and makes token ids of them, in a thread.

        Raises:
            ApiError: 429 where too many requests wait; 504 where the deadline is over.
            EngineError: see LLM.embed.
        """
        self._reserve(1)
        left = None if self._limit is None else max(self._begun + self._limit - time.perf_counter(), 0.0)
        try:
            async with asyncio.timeout(left):
                request = await asyncio.to_thread(make, self.llm.llm)
                begin = time.perf_counter()
                found = await self.llm.run_embedding(request)
        except TimeoutError:
            raise self._too_late() from None
        now = time.perf_counter()
        stats = GenerationStats(
            prompt_tokens=request.n_tokens,
            output_tokens=0,
            queue_seconds=begin - self._begun,
            prompt_seconds=now - begin,
            decode_seconds=0.0,
        )
        self._serving.metrics.finished(self.model.spec.name, "stop", stats, now - self._begun)
        return request, found

    async def results(self) -> list[GenerationResult]:
        """Wait for all sequences.

        Raises:
            ApiError: the deadline is over, or the server ends.
            EngineError: a step failed.
        """
        async for _ in self.events():
            pass
        return [stream.folded() for stream in self.streams]

    async def events(self, *, progress: bool = False) -> AsyncIterator[Told | PromptProgress]:
        """Chunks of all sequences as they come.

        Args:
            progress: tell how much of the first prompt has been read, until its first token.
        """
        if progress:
            async for one in self.streams[0].prompt_progress():
                yield one
        if len(self.streams) == 1:
            async for chunk in self.streams[0]:
                self._note(0, chunk)
                yield Told(0, chunk)
            return
        queue: asyncio.Queue[Told | Exception | None] = asyncio.Queue()
        pumps = [asyncio.ensure_future(_pump(i, stream, queue)) for i, stream in enumerate(self.streams)]
        try:
            left = len(pumps)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                    continue
                self._note(item.index, item.chunk)
                yield item
        finally:
            for pump in pumps:
                pump.cancel()

    def stats(self, index: int) -> GenerationStats:
        """Counts and times of a sequence so far, by the clock of the server."""
        stream, now = self.streams[index], time.perf_counter()
        first, last = self._first.get(index, now), self._last.get(index, now)
        return GenerationStats(
            prompt_tokens=len(stream.request.prompt_ids),
            output_tokens=stream.n_tokens,
            queue_seconds=0.0,
            prompt_seconds=first - self._begun,
            decode_seconds=last - first,
        )

    def close(self) -> None:
        """End whatever still runs, before the next step, and give the model back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream in self.streams:
            if stream.finish_reason is None:
                stream.cancel()
                self._serving.metrics.failed(self.model.spec.name)
        self.streams = []
        if self._entered:
            self._entered = False
            self.model.sequences -= self._reserved
            self._serving.store.release(self.model)

    # ----------------------------------------------------------------------------------------------------------------

    async def _ids(self, prompt: Given) -> list[int]:
        assert not isinstance(prompt, ChatPrompt), "conversations have token ids already"
        if is_short(prompt):
            return self.llm.llm.prompt_ids(prompt)
        return await asyncio.to_thread(self.llm.llm.prompt_ids, prompt)

    def _fitting(self, prompt: Given, params: SamplingParams) -> SamplingParams:
        """Parameters with no more tokens than the context has room for: max_tokens is a limit, not a wish."""
        n = len(prompt.token_ids if isinstance(prompt, ChatPrompt) else prompt)
        room = self.llm.llm.context_length - n
        if params.max_tokens is None or params.max_tokens <= room:
            return params
        if room < 1:
            raise ContextFullError(n, self.llm.llm.context_length, parts="of the prompt alone")
        return replace(params, max_tokens=room)

    def _reserve(self, n: int) -> None:
        """Take places for n sequences, in the batch or in the queue."""
        limit = self.llm.llm.max_sequences + self._serving.settings.max_waiting
        if n > limit:
            raise ApiError(
                400,
                f"the request asks for {n} sequences; this server takes at most {limit} at a time",
                param="n",
                code="invalid_value",
            )
        if self.model.sequences + n > limit:
            waiting = self.model.sequences - self.llm.llm.max_sequences
            raise ApiError(
                429,
                f"{max(waiting, 0)} requests wait already; try again later",
                code="queue_full",
                headers={"Retry-After": str(min(max(math.ceil(waiting / 8), 1), 30))},
            )
        self.model.sequences += n
        self._reserved += n

    def _expire(self) -> None:
        self._expired = True
        for stream in self.streams:
            stream.cancel()

    def _too_late(self) -> ApiError:
        return ApiError(504, f"the request took longer than its {self._limit:g} s", code="deadline_exceeded")

    def _note(self, index: int, chunk: StreamChunk) -> None:
        """Count a chunk; raises where its request was ended by the server."""
        metrics, name, now = self._serving.metrics, self.model.spec.name, time.perf_counter()
        if chunk.token_ids:
            before = self._last.get(index)
            n = len(chunk.token_ids)
            if before is None:
                self._first[index] = now
                metrics.first_token(name, now - self._begun)
            elif n:
                metrics.tokens(name, n, now - before)
            self._last[index] = now
        if chunk.finish_reason is not None:
            stats: GenerationStats | None = chunk.stats
            if stats is not None:
                metrics.finished(name, chunk.finish_reason, stats, now - self._begun)
            if chunk.finish_reason == "cancelled":
                if self._expired:
                    raise self._too_late()
                raise ApiError(503, "the server is shutting down", code="shutting_down")


async def _pump(index: int, stream: AsyncStream, queue: asyncio.Queue[Told | Exception | None]) -> None:
    try:
        async for chunk in stream:
            queue.put_nowait(Told(index, chunk))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
