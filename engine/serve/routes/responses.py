"""POST /v1/responses: OpenAI's newer form of conversations, without stored state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response

from engine.api.asynchronous.mailbox import PromptProgress
from engine.request import GenerationResult, StreamChunk
from engine.serve.answers.long_work import off_loop
from engine.serve.answers.respond import named_event, respond
from engine.serve.answers.response_items import ItemStream, items_of
from engine.serve.answers.wording import in_order, new_id, now, progress_entry, timings
from engine.serve.errors import ApiError
from engine.serve.fields.body import Body, Objects, read_body
from engine.serve.fields.conversations import answer_names, prompt_of, template_names
from engine.serve.fields.sampling import SamplingFields, params_of, structure_in
from engine.serve.run import Run
from engine.serve.serving import Serving


class Reasoning(Body):
    """How much the model thinks."""

    effort: str | None = None


class ResponsesBody(SamplingFields):
    """The fields of /v1/responses."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingFields.unsupported,
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
    }

    input: str | Objects
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_reasoning_tokens: int | None = None
    reasoning_format: str | None = None


def router(serving: Serving) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    @routes.post("/responses")
    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesBody)
        structure = structure_in(body, text_format=(body.text or {}).get("format"))
        messages = await off_loop(len(body.input), partial(messages_of, body))
        effort = body.reasoning.effort if body.reasoning is not None else None
        names = template_names(serving.settings.template_variables, body.chat_template_kwargs, effort)
        for index, tool in enumerate(body.tools or []):
            if tool.get("type", "function") != "function":
                raise ApiError(
                    400,
                    f"tools[{index}] is of type {tool['type']!r}; only functions are supported",
                    param="tools",
                    code="unsupported_parameter",
                )
        tools = [
            {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
            for tool in body.tools or []
        ]
        names |= answer_names(
            tools, body.tool_choice, body.parallel_tool_calls, body.max_reasoning_tokens, body.reasoning_format
        )
        run = Run(serving, body.model, body.timeout)
        answer = _Answer(body, run)

        async def start() -> None:
            given: dict[str, Any] = {"constraint": structure.constraint}
            if body.max_output_tokens is not None:
                given["max_tokens"] = body.max_output_tokens
            params = params_of(body, serving.settings, run.llm.llm, n=1, **given)
            prompt = await asyncio.to_thread(prompt_of, run.llm.llm, messages, names)
            watched = body.stream and body.return_progress
            await run.start([prompt], params, watched=watched, field=structure.field)

        return await respond(
            request,
            serving,
            run,
            start,
            answer.json,
            answer.events() if body.stream else None,
        )

    return routes


def messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The conversation that a request describes.

    Raises:
        ApiError: an item that is no message.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    thought = ""
    for index, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
            continue
        if kind == "function_call":
            function = {"name": str(item.get("name")), "arguments": item.get("arguments") or "{}"}
            call = {"id": str(item.get("call_id")), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, "tool_calls": []})
                if thought:
                    messages[-1]["reasoning_content"], thought = thought, ""
            messages[-1].setdefault("tool_calls", []).append(call)
            continue
        if kind == "function_call_output":
            output = item.get("output")
            if isinstance(output, list):
                output = "".join(str(part.get("text", "")) for part in output if isinstance(part, Mapping))
            messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": str(output)})
            continue
        if kind != "message" or "role" not in item:
            raise ApiError(
                400,
                f"input[{index}] is a {kind!r}; supported: message, reasoning, function_call, function_call_output",
                param=f"input[{index}]",
            )
        message = {"role": item["role"], "content": item.get("content")}
        if thought and item["role"] == "assistant":
            message["reasoning_content"] = thought
        thought = ""
        messages.append(message)
    return messages


class _Answer:
    """Puts one request's result into words."""

    def __init__(self, body: ResponsesBody, run: Run) -> None:
        self._body = body
        self._run = run
        self._id = new_id("resp_")
        self._created = now()
        self._number = -1

    def _response(self, result: GenerationResult | None, output: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The response object, before or after the end; `output` are its items where they were told already."""
        body = self._body
        value: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._run.model.spec.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if result is None:
            return value
        stats = result.stats
        value["status"] = "completed"
        if result.finish_reason == "length":
            value["status"], value["incomplete_details"] = "incomplete", {"reason": "max_output_tokens"}
        value["output"] = items_of(result) if output is None else output
        value["usage"] = {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens},
            "output_tokens": stats.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._n_reasoning(result.reasoning)},
            "total_tokens": stats.prompt_tokens + stats.output_tokens,
        }
        return value

    def _n_reasoning(self, text: str) -> int:
        """Tokens of the reasoning, its markers not counted."""
        return len(self._run.llm.llm.tokenizer.encode(text, add_special=False)) if text else 0

    def json(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole answer."""
        return self._response(results[0])

    def _event(self, kind: str, **values: Any) -> bytes:
        self._number += 1
        return named_event(kind, {"type": kind, "sequence_number": self._number, **values})

    async def events(self) -> AsyncIterator[bytes]:
        """The answer piece by piece, each item opened before its text and closed after it."""
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        items = ItemStream(self._event)
        async for told in self._run.events(progress=self._body.return_progress):
            timed = self._body.timings_per_token
            if isinstance(told, PromptProgress):
                entry = progress_entry(told, timed=timed)
                yield self._event("response.in_progress", response=self._response(None), **entry)
                continue
            extra = {"timings": timings(self._run.stats(0))} if timed else {}
            for one in _told(items, told.chunk, extra):
                yield one
        result = self._run.streams[0].folded()
        if not result.text and not result.tool_calls:
            for one in items.say(""):
                yield one
        for one in items.close():
            yield one
        # Also where the status is "incomplete": clients wait for this event, and read the status from the response.
        response = await off_loop(len(result.reasoning), partial(self._response, result, items.output))
        yield self._event("response.completed", response=response, timings=timings(result.stats))


def _told(items: ItemStream, chunk: StreamChunk, extra: dict[str, Any]) -> Iterator[bytes]:
    """What a chunk brings: first the rest of a call that is open, then reasoning and text, then calls that begin."""
    continued, begun = in_order(chunk.call_parts)
    for part in continued:
        yield from items.call(part, **extra)
    if chunk.reasoning:
        yield from items.reason(chunk.reasoning, **extra)
    if chunk.text:
        yield from items.say(chunk.text, **extra)
    for part in begun:
        yield from items.call(part, **extra)
