"""POST /completion: llama.cpp's own form of continuing texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.api.asynchronous.mailbox import PromptProgress
from engine.api.llm import LLM
from engine.request import GenerationResult, TokenSample
from engine.serve.answers.long_work import off_loop
from engine.serve.answers.respond import event, respond
from engine.serve.answers.wording import chat_logprobs, progress_entry, timings
from engine.serve.errors import ApiError
from engine.serve.fields.body import Strings, read_body
from engine.serve.fields.sampling import SamplingFields, params_of, structure_in
from engine.serve.routes.completions import prompts_of
from engine.serve.routes.models import generation_settings
from engine.serve.run import Run
from engine.serve.serving import Serving


class NativeBody(SamplingFields):
    """The fields of /completion."""

    prompt: str | list[Any] | dict[str, Any] = ""
    n_probs: int | None = None
    return_tokens: bool = False
    post_sampling_probs: bool = False
    response_fields: Strings | None = None


def router(serving: Serving) -> APIRouter:
    """The endpoint and its other name."""
    routes = APIRouter()

    @routes.post("/completion")
    @routes.post("/completions")
    async def completion(request: Request) -> Response:
        body = await read_body(request, NativeBody)
        if body.post_sampling_probs:
            raise ApiError(
                400,
                "post_sampling_probs is not supported by this server",
                param="post_sampling_probs",
                code="unsupported_parameter",
            )
        structure = structure_in(body)
        run = Run(serving, body.model, body.timeout)
        answer = _Answer(body, run)

        async def start() -> None:
            given = {"logprobs": body.n_probs or None, "constraint": structure.constraint}
            answer.params = params_of(body, serving.settings, run.llm.llm, **given)
            answer.prompts = await asyncio.to_thread(_prompts, body.prompt, run.llm.llm)  # long texts take seconds
            watched = body.stream and body.return_progress
            await run.start(answer.prompts, answer.params, watched=watched, field=structure.field)

        return await respond(request, serving, run, start, answer.json, answer.events() if body.stream else None)

    return routes


def _prompts(given: Any, llm: LLM) -> list[str | list[int]]:
    """A text, token ids, both mixed, or several of these; an object has its text as "prompt_string"."""
    if isinstance(given, dict):
        return [_one(given, llm)]
    if isinstance(given, list) and given and all(isinstance(one, (int, str)) for one in given):
        if any(isinstance(one, int) for one in given):
            return [_mixed(given, llm)]
        return [str(one) for one in given]
    if isinstance(given, list):
        return [_one(one, llm) for one in prompts_of(given)]
    return [given]


def _one(given: Any, llm: LLM) -> str | list[int]:
    if isinstance(given, dict):
        if given.get("multimodal_data"):
            raise ApiError(
                400, "multimodal_data is not supported: this server reads text", param="prompt", code="invalid_value"
            )
        given = given.get("prompt_string")
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(isinstance(one, (int, str)) for one in given):
        return _mixed(given, llm)
    raise ApiError(400, "prompt is text, token ids, or a list of these", param="prompt", code="invalid_type")


def _mixed(given: list[Any], llm: LLM) -> list[int]:
    """Texts and token ids in a row; the first text gets what the model wants at the beginning."""
    ids: list[int] = []
    for index, one in enumerate(given):
        ids += [one] if isinstance(one, int) else llm.tokenizer.encode(one, add_special=index == 0)
    return ids


class _Answer:
    """Puts one request's results into words."""

    def __init__(self, body: NativeBody, run: Run) -> None:
        self._body = body
        self._run = run
        self.params: Any = None
        self.prompts: list[str | list[int]] = []

    def json(self, results: Sequence[GenerationResult]) -> Any:
        """The whole answer: an object for one sequence, a list for several."""
        values = []
        for index, result in enumerate(results):
            value = self._last(index, result)
            value["content"] = result.text
            value["tokens"] = result.token_ids if self._body.return_tokens else []
            if result.logprobs is not None:
                value["completion_probabilities"] = self._probabilities(result.logprobs)
            values.append(self._chosen(value))
        return values[0] if len(values) == 1 else values

    async def events(self) -> AsyncIterator[bytes]:
        """The answer piece by piece."""
        done: dict[int, int] = {}
        async for told in self._run.events(progress=self._body.return_progress):
            if isinstance(told, PromptProgress):
                yield event(
                    {
                        "content": "",
                        "tokens": [],
                        "stop": False,
                        **progress_entry(told, timed=self._body.timings_per_token),
                    }
                )
                continue
            index, chunk = told.index, told.chunk
            stream = self._run.streams[index]
            done[index] = done.get(index, 0) + len(chunk.token_ids)
            if chunk.token_ids:
                value: dict[str, Any] = {
                    "index": index,
                    "content": chunk.text,
                    "tokens": list(chunk.token_ids),
                    "stop": False,
                    "tokens_predicted": done[index],
                    "tokens_evaluated": len(stream.request.prompt_ids),
                }
                if chunk.logprobs:
                    value["completion_probabilities"] = self._probabilities(chunk.logprobs)
                if self._body.timings_per_token:
                    value["timings"] = timings(self._run.stats(index))
                yield event(value)
            if chunk.finish_reason is not None:
                n = len(self.prompts[index // self.params.n])
                last = await off_loop(n, partial(self._last, index, stream.folded()))
                yield event({**last, "content": "" if chunk.token_ids else chunk.text, "tokens": []})

    def _last(self, index: int, result: GenerationResult) -> dict[str, Any]:
        params, llm = self._run.streams[index].request.params, self._run.llm.llm
        ended = result.token_ids[-1] if result.token_ids else -1
        ids = {*params.stop_token_ids, *(llm.tokenizer.eog_ids if llm.has_tokenizer else ())}
        kind = "limit" if result.finish_reason == "length" else "eos" if ended in ids else "word"
        prompt = self.prompts[index // self.params.n]
        return {
            "index": index,
            "id_slot": -1,
            "stop": True,
            "model": self._run.model.spec.name,
            "tokens_predicted": result.stats.output_tokens,
            "tokens_evaluated": result.stats.prompt_tokens,
            "generation_settings": generation_settings(params, result.seed, llm),
            "prompt": prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt, skip_special=False),
            "has_new_line": "\n" in result.text,
            "truncated": False,
            "stop_type": kind,
            "stopping_word": params.stop[0] if kind == "word" and len(params.stop) == 1 else "",
            "tokens_cached": result.stats.cached_tokens,
            "timings": timings(result.stats),
        }

    def _probabilities(self, samples: Sequence[TokenSample]) -> list[dict[str, Any]]:
        return chat_logprobs(self._run.llm.llm, samples, self._body.n_probs or 0)

    def _chosen(self, value: dict[str, Any]) -> dict[str, Any]:
        """The fields that were asked for, by paths like "generation_settings/n_predict"."""
        if not self._body.response_fields:
            return value
        chosen: dict[str, Any] = {}
        for path in self._body.response_fields:
            found: Any = value
            for key in path.split("/"):
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                chosen[path] = found
        return chosen
