"""POST /v1/chat/completions: conversations in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.api.asynchronous.mailbox import PromptProgress
from engine.request import CallPart, GenerationResult, GenerationStats
from engine.sampling.params import MAX_LOGPROBS
from engine.serve.answers.respond import DONE, event, respond
from engine.serve.answers.wording import (
    FINGERPRINT,
    chat_logprobs,
    finish_reason,
    new_id,
    now,
    progress_entry,
    timings,
    usage,
)
from engine.serve.errors import ApiError
from engine.serve.fields.body import Objects, read_body
from engine.serve.fields.conversations import answer_names, is_continued, prompt_of, template_names
from engine.serve.fields.sampling import SamplingFields, StreamOptions, params_of, structure_in
from engine.serve.run import Run
from engine.serve.serving import Serving


class ChatBody(SamplingFields):
    """The fields of /v1/chat/completions."""

    messages: list[Any]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    verbose: bool | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_reasoning_tokens: int | None = None
    reasoning_format: str | None = None


def router(serving: Serving) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        continued = is_continued(body.messages, body.continue_final_message, body.add_generation_prompt)
        if body.add_generation_prompt is False and not continued:
            raise ApiError(
                400,
                "add_generation_prompt is false, but messages does not end with an answer that could be continued",
                param="add_generation_prompt",
                code="invalid_value",
            )
        names = template_names(serving.settings.template_variables, body.chat_template_kwargs, body.reasoning_effort)
        names |= answer_names(
            body.tools, body.tool_choice, body.parallel_tool_calls, body.max_reasoning_tokens, body.reasoning_format
        )
        structure = structure_in(body)
        run = Run(serving, body.model, body.timeout)
        answer = _Answer(body, run)

        async def start() -> None:
            llm = run.llm.llm
            params = params_of(body, serving.settings, llm, logprobs=answer.top, constraint=structure.constraint)
            prompt = await asyncio.to_thread(prompt_of, llm, body.messages, names, continued=continued)
            if serving.settings.show_prompts if body.verbose is None else body.verbose:
                answer.shown = {"__verbose": {"prompt": prompt.text}}
            watched = body.stream and body.return_progress
            await run.start([prompt], params, watched=watched, field=structure.field)

        return await respond(request, serving, run, start, answer.json, answer.events() if body.stream else None)

    return routes


class _Answer:
    """Puts one request's results into words.

    Attributes:
        top: alternatives of each token that the engine must report; None: no log-probabilities.
        shown: what a whole answer has for people who look for an error in a template.
    """

    def __init__(self, body: ChatBody, run: Run) -> None:
        self._body = body
        self._run = run
        self._id = new_id("chatcmpl-")
        self._created = now()
        self.shown: dict[str, Any] = {}
        top = body.top_logprobs
        if top is not None and not 0 <= top <= MAX_LOGPROBS:
            raise ApiError(
                400,
                f"top_logprobs is {top}; allowed: 0 to {MAX_LOGPROBS}",
                param="top_logprobs",
                code="invalid_value",
            )
        if top and body.logprobs is False:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        self.top = (top or 0) if body.logprobs or top else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._run.model.spec.name,
            "system_fingerprint": FINGERPRINT,
        }

    def json(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, result in enumerate(results):
            message: dict[str, Any] = {"role": "assistant", "content": result.text}
            if result.reasoning:
                message |= _reasoning(result.reasoning)
            if result.tool_calls:
                message["content"] = result.text or None
                message["tool_calls"] = [call.as_dict() for call in result.tool_calls]
            choice = {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason(result)}
            if result.logprobs is not None:
                choice["logprobs"] = {
                    "content": chat_logprobs(self._run.llm.llm, result.logprobs, self.top or 0),
                    "refusal": None,
                }
            choices.append(choice)
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage([result.stats for result in results], len(results)),
            "timings": timings(results[0].stats),
            **self.shown,
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer piece by piece: the role, then what comes, then the reason of the end."""
        head, options = self._head("chat.completion.chunk"), self._body.stream_options

        def choice(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

        for index in range(len(self._run.streams)):
            yield event({**head, "choices": [choice(index, {"role": "assistant", "content": None})]})
        stats: dict[int, GenerationStats] = {}
        called: set[int] = set()
        async for told in self._run.events(progress=self._body.return_progress):
            if isinstance(told, PromptProgress):
                yield event({**head, "choices": [], **progress_entry(told, timed=self._body.timings_per_token)})
                continue
            index, chunk = told.index, told.chunk
            delta: dict[str, Any] = {}
            if chunk.reasoning:
                delta |= _reasoning(chunk.reasoning)
            if chunk.text:
                delta["content"] = chunk.text
            if chunk.call_parts:
                called.add(index)
            if delta or chunk.logprobs:
                one = choice(index, delta)
                if self.top is not None:
                    entries = chat_logprobs(self._run.llm.llm, chunk.logprobs, self.top)
                    one["logprobs"] = {"content": entries, "refusal": None}
                value: dict[str, Any] = {**head, "choices": [one]}
                if self._body.timings_per_token:
                    value["timings"] = timings(self._run.stats(index))
                yield event(value)
            for part in _call_deltas(chunk.call_parts):
                yield event({**head, "choices": [choice(index, {"tool_calls": [part]})]})
            if chunk.finish_reason is not None and chunk.stats is not None:
                stats[index] = chunk.stats
                reason = chunk.finish_reason
                if index in called and reason == "stop":
                    reason = "tool_calls"
                yield event({**head, "choices": [choice(index, {}, reason)], "timings": timings(chunk.stats)})
        if options is not None and options.include_usage:
            ordered = [stats[index] for index in sorted(stats)]
            yield event(
                {
                    **head,
                    "choices": [],
                    "usage": usage(ordered, len(ordered)),
                    "timings": timings(ordered[0]),
                }
            )
        yield DONE


def _call_deltas(parts: Sequence[CallPart]) -> Iterator[dict[str, Any]]:
    """Name and id of a call first, then its arguments as they come: clients put them together."""
    for part in parts:
        if part.name is not None:
            begun = {"name": part.name, "arguments": ""}
            yield {"index": part.index, "id": part.id, "type": "function", "function": begun}
        if part.arguments:
            yield {"index": part.index, "function": {"arguments": part.arguments}}


def _reasoning(text: str) -> dict[str, str]:
    """Reasoning under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}
