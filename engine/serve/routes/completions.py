"""POST /v1/completions: texts or token ids are continued."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from engine.api.asynchronous.mailbox import PromptProgress
from engine.api.llm import LLM
from engine.request import GenerationResult, GenerationStats, StreamChunk, TokenSample
from engine.sampling.params import MAX_LOGPROBS, SamplingParams
from engine.serve.answers.long_work import off_loop
from engine.serve.answers.respond import DONE, event, respond
from engine.serve.answers.wording import FINGERPRINT, finite, new_id, now, progress_entry, timings, token_entry, usage
from engine.serve.errors import ApiError
from engine.serve.fields.body import read_body
from engine.serve.fields.sampling import SamplingFields, StreamOptions, params_of, structure_in
from engine.serve.fields.structure import Structure
from engine.serve.run import Run
from engine.serve.serving import Serving

_JSON_NAMES = {
    str: "texts",
    list: "lists",
    int: "token ids",
    float: "fractions",
    bool: "true or false",
    dict: "objects",
    type(None): "null",
}
"""Of the types of parsed JSON, for people."""

Prompts = list[str | list[int]]
Entries = list[tuple[int, TokenSample | None]]


class CompletionBody(SamplingFields):
    """The fields of /v1/completions."""

    prompt: str | list[Any] = ""
    echo: bool = False
    logprobs: int | bool | None = None
    prompt_logprobs: int | None = None
    suffix: str | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(False, description="token ids beside the texts")


def prompts_of(given: str | list[Any]) -> Prompts:
    """One or several prompts as a list of them. What is in lists of token ids is checked with the vocabulary.

    Raises:
        ApiError: there is none, or something else is among them.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "prompt is an empty list", param="prompt", code="invalid_value")
    kinds = set(map(type, given))  # of a million entries in 20 ms; a loop takes ten times as long
    if kinds == {int}:
        return [given]
    if not kinds <= {str, list}:
        raise ApiError(
            400,
            "prompt is a text, a list of token ids, or a list of these; found a list with "
            + " and ".join(sorted(_JSON_NAMES[kind] for kind in kinds)),
            param="prompt",
            code="invalid_type",
        )
    for index, one in enumerate(given):
        if isinstance(one, list) and not {int}.issuperset(map(type, one)):
            raise ApiError(400, f"prompt[{index}] is a list with other things than token ids", param="prompt")
    return given


def router(serving: Serving) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        if body.suffix:
            raise ApiError(
                400, "suffix is not supported by this server yet", param="suffix", code="unsupported_parameter"
            )
        prompts = prompts_of(body.prompt)
        structure = structure_in(body)
        run = Run(serving, body.model, body.timeout)
        answer = _Answer(body, run)

        async def start() -> None:
            given = {**answer.logprob_params(), "constraint": structure.constraint}
            await answer.start(prompts, params_of(body, serving.settings, run.llm.llm, **given), structure)

        return await respond(request, serving, run, start, answer.json, answer.events() if body.stream else None)

    return routes


class _Answer:
    """Puts one request's results into words."""

    def __init__(self, body: CompletionBody, run: Run) -> None:
        self._body = body
        self._run = run
        self._id = new_id("cmpl-")
        self._created = now()
        wanted = body.logprobs
        self._top = None if wanted is None or wanted is False else (1 if wanted is True else wanted)
        if self._top is not None and not 0 <= self._top <= MAX_LOGPROBS:
            raise ApiError(
                400, f"logprobs is {self._top}; allowed: 0 to {MAX_LOGPROBS}", param="logprobs", code="invalid_value"
            )

    def logprob_params(self) -> dict[str, Any]:
        """Parameters that the engine needs for what was asked for."""
        prompt = self._body.prompt_logprobs
        if self._body.echo and self._top is not None:
            prompt = self._top if prompt is None else max(prompt, self._top)
        return {"logprobs": self._top, "prompt_logprobs": prompt}

    async def start(self, prompts: Prompts, params: SamplingParams, structure: Structure) -> None:
        """Queue the prompts."""
        self._params = params
        self._prompts = prompts
        watched = self._body.stream and self._body.return_progress
        await self._run.start(prompts, params, watched=watched, field=structure.field)

    @property
    def _llm(self) -> LLM:
        return self._run.llm.llm

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._run.model.spec.name,
            "system_fingerprint": FINGERPRINT,
        }

    def json(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, result in enumerate(results):
            echo = self._echo(index)
            choice: dict[str, Any] = {"text": echo + result.text, "index": index, "finish_reason": result.finish_reason}
            choice["logprobs"] = self._logprobs(result.logprobs or (), self._scores(index, result.prompt_logprobs), 0)
            if result.prompt_logprobs is not None and self._body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = [self._prompt_entry(one) for one in result.prompt_logprobs]
            if self._body.return_token_ids:
                choice["prompt_token_ids"], choice["token_ids"] = result.prompt_token_ids, result.token_ids
            choices.append(choice)
        return {
            **self._head(),
            "choices": choices,
            "usage": usage([result.stats for result in results], self._params.n),
            "timings": timings(results[0].stats),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer piece by piece."""
        head, options = self._head(), self._body.stream_options
        stats: dict[int, GenerationStats] = {}
        offsets: dict[int, int] = {}
        async for told in self._run.events(progress=self._body.return_progress):
            if isinstance(told, PromptProgress):
                yield event({**head, "choices": [], **progress_entry(told, timed=self._body.timings_per_token)})
                continue
            index, chunk = told.index, told.chunk
            # The first chunk may have the whole prompt in it, with log-probabilities.
            n = len(self._run.streams[index].request.prompt_ids) if index not in offsets and self._body.echo else 0
            choice = await off_loop(n, partial(self._choice, index, chunk, offsets.get(index)))
            offsets[index] = offsets.get(index, 0) + len(choice["text"])
            if self._body.return_token_ids:
                choice["token_ids"] = list(chunk.token_ids)
            value = {**head, "choices": [choice]}
            if chunk.stats is not None:
                stats[index] = chunk.stats
                value["timings"] = timings(chunk.stats)
            elif self._body.timings_per_token:
                value["timings"] = timings(self._run.stats(index))
            if choice["text"] or chunk.finish_reason is not None or chunk.logprobs or chunk.token_ids:
                yield await off_loop(n, partial(event, value))
        if options is not None and options.include_usage:
            ordered = [stats[index] for index in sorted(stats)]
            yield event({**head, "choices": [], "usage": usage(ordered, self._params.n)})
        yield DONE

    def _choice(self, index: int, chunk: StreamChunk, offset: int | None) -> dict[str, Any]:
        """A chunk; the prompt is before the text of the first one, which has no offset, where it is asked for."""
        echo = self._echo(index) if offset is None else ""
        logprobs = None
        if self._top is not None:
            logprobs = self._logprobs(chunk.logprobs, self._scores(index, chunk.prompt_logprobs), offset or 0)
        return {
            "text": echo + chunk.text,
            "index": index,
            "logprobs": logprobs,
            "finish_reason": chunk.finish_reason,
        }

    def _scores(self, index: int, scores: Sequence[TokenSample | None] | None) -> Entries:
        """Tokens of the prompt with their log-probabilities, where the prompt is part of the text."""
        if scores is None or not self._body.echo:
            return []
        return list(zip(self._run.streams[index].request.prompt_ids, scores, strict=True))

    def _echo(self, index: int) -> str:
        """The prompt as text, where it is asked for."""
        if not self._body.echo:
            return ""
        prompt = self._prompts[index // self._params.n]
        return prompt if isinstance(prompt, str) else self._llm.tokenizer.decode(prompt)

    def _logprobs(self, samples: Sequence[TokenSample], prompt: Entries, offset: int) -> dict[str, Any] | None:
        """The lists that /v1/completions has, with what newer clients read in "content"."""
        if self._top is None:
            return None
        llm, top = self._llm, self._top
        tokens, values, tops, offsets, content = [], [], [], [], []
        entries: Entries = [*prompt, *((sample.token_id, sample) for sample in samples)]
        for token_id, sample in entries:
            logprob = sample.logprob if sample is not None else None
            entry = token_entry(llm, token_id, logprob if logprob is not None else 0.0)
            text = "" if llm.has_tokenizer and llm.tokenizer.is_control(token_id) else entry["token"]
            tokens.append(entry["token"])
            values.append(finite(logprob) if logprob is not None else None)
            offsets.append(offset)
            offset += len(text)
            best = sample.top_logprobs[:top] if sample is not None else ()
            named = [token_entry(llm, other, value) for other, value in best]
            tops.append({one["token"]: one["logprob"] for one in named} if sample is not None else None)
            content.append({**entry, "top_logprobs": named})
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if top else None,
            "text_offset": offsets,
            "content": content,
        }

    def _prompt_entry(self, sample: TokenSample | None) -> dict[str, Any] | None:
        """vLLM's entry of one prompt token: by id, the token itself and its best alternatives."""
        if sample is None:
            return None
        llm, entries = self._llm, {sample.token_id: sample.logprob or 0.0, **dict(sample.top_logprobs)}
        return {
            str(token_id): {"logprob": finite(value), "decoded_token": token_entry(llm, token_id, value)["token"]}
            for token_id, value in entries.items()
        }
