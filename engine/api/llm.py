"""The facade: text or token ids in, text and token ids out.

Three thin levels over one path: generate() folds what stream() yields, stream() takes what step() produces. Knows
neither HTTP nor devices; those are behind the runner.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

from engine.api.chats import Chats, Message
from engine.api.embedding.embedding_queue import EmbeddingQueue
from engine.api.embedding.embeddings import Embeddings, RankedDocument
from engine.api.names import resolve_model
from engine.api.prompts import Prompt, as_prompts
from engine.api.requests import Requests
from engine.api.settings import config_of
from engine.api.stream import Stream
from engine.api.tokenizers import open_tokenizer
from engine.api.whole import one_sample, params_of_each, results_of
from engine.config import PAGE, EngineConfig, EngineSettings
from engine.errors import ContextFullError, DeviceError
from engine.gguf import open_gguf
from engine.model.config import Pooling
from engine.model.loader import load_model
from engine.model.memory import MemoryPlan
from engine.request import GenerationResult, Request, StreamChunk, TokenSample
from engine.runner.devices import open_runner
from engine.runner.pooling import Pooler
from engine.runner.protocol import Runner
from engine.sampling.params import SamplingParams
from engine.scheduling.job import Job
from engine.scheduling.loop import EngineLoop
from engine.scheduling.occupancy import Occupancy
from engine.text import ChatPrompt, ChatTemplate, Tokenizer, form_named
from engine.text.answers.thoughts import ReasoningFormat

if TYPE_CHECKING:
    import numpy as np


BUNDLED_MODEL = Path(__file__).parents[1] / "data" / "tales-Q4_K_M.gguf"
"""A small story-telling model that comes with the package, so that everything can be tried without a download."""


class LLM:
    """An open model. Use it as a context manager, or call close().

    All methods may be called from several threads at once; requests that run at the same time share one batch.

    LLM("model.gguf", "cpu", threads=4), LLM(EngineConfig("model.gguf", "cpu", threads=4)) and
    LLM(config=EngineConfig(...)) are the same. Settings given beside a config replace those in it.

    Args:
        model: a GGUF file, any part of a split one, or `hf:owner/repo[:quant][@revision]`, fetched from the
            Hugging Face hub where it is not in the cache; or a config. None opens the bundled demonstration model.
        device: "auto" (a usable GPU, else the CPU), "cpu", "cuda" or "cuda:N"; None is that of the config, or "auto".
        config: all settings together.
        status: called with one short sentence whenever something takes longer ("preparing kernels ...").
        settings: see EngineConfig.

    Raises:
        DownloadError: a model named hf:... cannot be fetched.
        ModelFileError: the file is damaged, or something in it is not supported.
        DeviceError: the device asked for cannot be used.
        InvalidRequestError: a setting out of range.

    Attributes:
        embeddings: the two halves of embed() and rerank(), checking and running, for callers that need them apart.
    """

    def __init__(
        self,
        model: str | Path | EngineConfig | None = None,
        device: str | None = None,
        *,
        config: EngineConfig | None = None,
        status: Callable[[str], None] | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        begin = time.perf_counter()
        wanted = config_of(model, device, config, settings)
        path = BUNDLED_MODEL if wanted.model is None else resolve_model(wanted.model, status)
        self.config = replace(wanted, model=path)
        form_named(wanted.tool_format)
        ReasoningFormat.parse(wanted.reasoning_format)
        self._file = open_gguf(path)
        try:
            metadata = self._file.metadata
            self.model = load_model(self._file, self.config.resolve_context, strict=self.config.strict)
            tokenizer = open_tokenizer(metadata, path, self.config.pre_tokenizer)
            self._runner = open_runner(self.config, self.model, status or (lambda _: None))
        except BaseException:
            self._file.close()
            raise
        self._loop = EngineLoop(
            self._runner,
            prefix_cache=self.config.prefix_cache,
            checkpoint_spacing=self.config.checkpoint_spacing,
        )
        self._requests = Requests(tokenizer, self._runner.config, self._runner.context_length)
        self._chats = Chats(self.config, metadata, self._requests)
        pooler = Pooler(self.model)
        queue = EmbeddingQueue(self._loop, pooler)
        self.embeddings = Embeddings(self._requests, queue, pooler, self._runner.context_length, metadata)
        self.load_seconds = time.perf_counter() - begin

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop all requests and free the cache, the weights and the file.

        A call that an interrupt cut short can be repeated; after one that was not a further call does nothing.

        Raises:
            DeviceError: the GPU failed in one of the last steps, which no call has told yet; all is freed.
        """
        try:
            self._loop.close()
        except DeviceError:
            self._file.close()
            raise
        self._file.close()

    def prepare_constraints(self) -> None:
        """Read the vocabulary into the library that constrains texts, which the first such request would wait for.

        Takes 0.3 to 0.6 s for 128 thousand tokens, once per model; requests that run meanwhile wait. A model without a
        tokenizer has no constraints, and nothing is done.
        """
        if self._requests.has_tokenizer:
            self._requests.compiler().prepare()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerError: the file has none, or one that is not supported.
        """
        return self._requests.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used; token ids always can."""
        return self._requests.has_tokenizer

    @property
    def device(self) -> str:
        """What the model runs on, for people."""
        return self._runner.device_name

    @property
    def context_length(self) -> int:
        """Tokens of one sequence, prompt and output together."""
        return self._runner.context_length

    @property
    def max_sequences(self) -> int:
        """Sequences that run side by side."""
        return self._runner.max_sequences

    @property
    def cache_tokens(self) -> int:
        """Positions of the key-value cache, shared by all sequences."""
        return self._runner.n_pages * PAGE

    @property
    def active_requests(self) -> int:
        """Requests that are waiting or running."""
        return self._loop.n_active

    @property
    def threads(self) -> int | None:
        """CPU threads in use; None where the model does not run on the CPU."""
        return self._runner.threads

    def memory_plan(self) -> MemoryPlan:
        """Bytes that the open model takes."""
        return self._runner.memory_plan()

    def read_bandwidth(self) -> float | None:
        """Measure the bytes per second that the device reads from its memory; None where it cannot say."""
        with self._loop.exclusive() as runner:
            return runner.read_bandwidth()

    def exclusive_runner(self) -> AbstractContextManager[Runner]:
        """The runner for measurements outside the step loop; all requests wait meanwhile."""
        return self._loop.exclusive()

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = None) -> GenerationResult: ...
    @overload
    def generate(self, prompt: list[int], params: SamplingParams | None = None) -> GenerationResult: ...
    @overload
    def generate(
        self, prompt: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[GenerationResult]: ...
    def generate(
        self, prompt: Any, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> GenerationResult | list[GenerationResult]:
        """Complete one prompt, or several in one batch.

        Args:
            prompt: text, or a list of token ids, or a list of such prompts (texts and id lists may be mixed).
            params: for all prompts, or a list with one for each.

        Returns:
            One result for one prompt, a list in the same order for a list. With params.n above 1 it is the first of n
            samples, and its attribute `samples` holds them all; they share the prompt's place in the cache.

        Raises:
            InvalidRequestError, ContextFullError: refused before anything ran.
            EngineError: a step failed; its attribute `partial_results` holds the prompts that were finished.
        """
        prompts, single = as_prompts(prompt)
        each = params_of_each(params, len(prompts))
        groups = [self._requests.samples(one, its) for one, its in zip(prompts, each, strict=True)]
        results = results_of([[Stream(self._loop, job) for job in jobs] for jobs in groups])
        return results[0] if single else results

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Complete one prompt, chunk by chunk as the tokens come.

        Closing or forgetting the stream ends the request and frees its place; its result() is what generate() returns.

        Raises:
            InvalidRequestError, ContextFullError: refused at once, before anything ran.
        """
        return Stream(self._loop, self._requests.job(prompt, one_sample(params)))

    def sample_streams(self, prompt: Prompt, params: SamplingParams | None = None) -> list[Stream]:
        """The params.n samples of one prompt, each a stream; they run side by side and share the prompt's pages.

        Raises:
            InvalidRequestError, ContextFullError: refused at once, before anything ran.
        """
        return [Stream(self._loop, job) for job in self._requests.samples(prompt, params or SamplingParams())]

    def require_chat_template(self) -> ChatTemplate:
        """The chat template in force.

        Raises:
            InvalidRequestError: the model has none and none was given.
            TokenizerError: it does not parse.
        """
        return self._chats.template()

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The prompt that the model's chat template makes of messages, as token ids.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the messages.
        """
        return list(self.chat_prompt(messages, **variables).token_ids)

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> ChatPrompt:
        """render_chat() with the text, and with what is needed to read the answer."""
        return self._chats.prompt(messages, variables)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> GenerationResult:
        """The model's answer to messages {"role": ..., "content": ...}, put into words by its chat template.

        The result's text is the answer itself; what the model thought before it is in `reasoning`, the calls that it
        asks for are in `tool_calls`. `as_message()` is the message to put into the conversation for the next turn.

        Args:
            messages: see engine.text.templates.messages.checked_messages.
            params: sampling parameters.
            variables: further names for the template, as enable_thinking=False. Some are about the answer:
                `tools`, descriptions of functions in OpenAI's form; `tool_choice`, "auto", "none", "required" or
                {"type": "function", "function": {"name": ...}}; `parallel_tool_calls`, whether there may be several
                calls; `max_reasoning_tokens`, after which reasoning is ended.
        """
        return self.stream_chat(messages, params, **variables).result()

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Stream:
        """chat(), chunk by chunk."""
        return self.chat_streams(messages, one_sample(params), **variables)[0]

    def chat_streams(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> list[Stream]:
        """The params.n answers of a chat, each a stream; see sample_streams()."""
        prompt = self.chat_prompt(messages, **variables)
        params = params or SamplingParams()
        constrained = params.constraint is not None
        jobs = self._chat_jobs(prompt, params)
        readers = (partial(prompt.reader, constrained=constrained, key=secrets.token_hex(8)) for _ in jobs)
        return [Stream(self._loop, job, make_reader) for job, make_reader in zip(jobs, readers, strict=True)]

    def _chat_jobs(self, prompt: ChatPrompt, params: SamplingParams, *, by_step: bool = False) -> list[Job]:
        opening = prompt.opening() if params.constraint is not None else None
        return self._requests.samples(
            prompt.token_ids, params, prompt.shown_ids, opening, rules=prompt.rules, by_step=by_step
        )

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt for step(); returns the id that its chunks will carry."""
        return self.submit([self._requests.job(prompt, one_sample(params), by_step=True)])[0].request_id

    def add_requests(self, prompt: Prompt | ChatPrompt, params: SamplingParams | None = None) -> list[Request]:
        """Queue the params.n samples of a prompt for step(); returns each with its request_id and seed.

        Args:
            prompt: text, token ids, or what chat_prompt() gives.
            params: sampling parameters.
        """
        return self.submit(self.jobs(prompt, params))

    def jobs(self, prompt: Prompt | ChatPrompt, params: SamplingParams | None = None) -> list[Job]:
        """The checked requests of add_requests(), not queued yet. Grammars are compiled here.

        Raises:
            InvalidRequestError, ContextFullError: refused.
        """
        params = params or SamplingParams()
        if isinstance(prompt, ChatPrompt):
            return self._chat_jobs(prompt, params, by_step=True)
        return self._requests.samples(prompt, params, by_step=True)

    def submit(self, jobs: list[Job]) -> list[Request]:
        """Queue what jobs() gives for step()."""
        requests = [job.request for job in jobs]
        try:
            self._loop.submit(jobs)
            return requests
        except BaseException:  # the caller will not know the ids
            for request in requests:
                self._loop.cancel(request.request_id)
            raise

    def occupancy(self) -> Occupancy:
        """What is running and waiting now, and how full the cache is. Never waits for a step."""
        return self._loop.occupancy()

    def step(self) -> list[StreamChunk]:
        """Advance all running sequences by one step; returns the new chunks of requests made by add_request()."""
        chunks: list[StreamChunk] = []
        try:
            return self._loop.step(chunks)
        except BaseException as error:
            self._loop.give_back(chunks, error)
            raise

    def cancel(self, request_id: int) -> None:
        """End a request: its last chunk has finish_reason "cancelled". Unknown and finished ids are ignored."""
        self._loop.cancel(request_id)

    def logits(self, prompt: Prompt) -> np.ndarray:
        """Raw next-token scores after every token of a prompt: (T, V) float32.

        Raises:
            InvalidRequestError, ContextFullError: an impossible prompt.
        """
        self._requests.require_generation()
        ids = self.prompt_ids(prompt)
        if len(ids) > self.context_length:
            raise ContextFullError(len(ids), self.context_length)
        with self._loop.exclusive() as runner:
            return runner.logits(ids)

    def embed(
        self,
        texts: Any,
        *,
        pooling: str | Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        instruction: str | None = None,
        truncate: bool = False,
    ) -> Any:
        """Embeddings of texts, which run in packed batches beside whatever else runs.

        Args:
            texts: a text or a list of token ids, or a list of these.
            pooling: how the vectors of a text's tokens become one: "mean", "cls" (the first), "last", "none" (they do
                not) or "rank" (scores of a classification head). None takes what the file asks for; where it does not
                say, the last one in models whose tokens see earlier ones alone, else the mean.
            normalize: divide every vector by its Euclidean length; scores never are.
            dimensions: keep so many numbers of each vector, for models that were trained for that (Matryoshka).
            instruction: put before every text as it is; where it holds "{text}" the text goes there.
            truncate: cut texts that are longer than the context, instead of refusing them.

        Returns:
            float32 (n, width), one row per text; with "rank" (n, labels); with "none" a list of arrays (T, width).

        Raises:
            InvalidRequestError: a setting out of range, or something that is no text.
            ContextFullError: a text is longer than the context.
        """
        request = self.embeddings.request(
            texts,
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            instruction=instruction,
            truncate=truncate,
        )
        return self.embeddings.together(request, self.embeddings.run(request))

    def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[RankedDocument]:
        """Documents in the order of how well they answer a query, by the classification head of a reranker.

        Args:
            query: what is asked.
            documents: texts.
            top_n: how many to return; None = all.

        Raises:
            InvalidRequestError: the model has no such head, something is no text, or top_n is below 1.
            ContextFullError: query and document together are longer than the context.
        """
        request = self.embeddings.ranking(query, documents, top_n)
        return request.ranked(self.embeddings.run(request))

    def perplexity(self, text: str, context: int = 512) -> float:
        """How well the model predicts a text: exp of its mean loss per token, in chunks of `context` tokens.

        See engine.api.perplexity for the method, which is llama.cpp's, and for running values and the standard error.

        Raises:
            InvalidRequestError, ContextFullError: the text is shorter than one chunk, or a chunk does not fit.
        """
        from engine.api.perplexity import cut, measure

        *_, last = measure(self, cut(self, text, context))
        return last.value

    def score(self, chunks: Sequence[Sequence[int]], first: int = 1) -> Iterator[list[TokenSample]]:
        """Log-probability of every token of each chunk from position `first` on, given those before it.

        Chunks run in batches and are yielded in order; nothing is generated and no logits are kept.

        Raises:
            InvalidRequestError, ContextFullError: an impossible chunk, or no token behind `first`.
        """
        streams = [Stream(self._loop, job) for job in self._requests.scoring(chunks, first)]
        try:
            while streams:
                result = streams.pop(0).result()  # and forgotten: a long text has many chunks
                yield [sample for sample in result.prompt_logprobs or () if sample is not None]
        finally:
            for stream in streams:
                stream.close()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt is to the model, checked; an empty prompt is the beginning-of-text token alone.

        Raises:
            InvalidRequestError: no prompt at all, an id outside the vocabulary, or an empty one where there is no such
                token.
            ContextFullError: a text whose length alone says that it has more tokens than the context. Others may have
                more as well.
        """
        self._requests.check_length(prompt)
        return self._requests.prompt_ids(prompt)
