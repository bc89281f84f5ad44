"""POST /v1/responses: OpenAI's newer form of conversations, without stored state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response

from engine.api.mailbox import PromptProgress
from engine.request import GenerationResult, ToolCall
from engine.serve.answers import named_event, respond
from engine.serve.body import Body, read_body
from engine.serve.conversations import answer_names, prompt_of, template_names
from engine.serve.errors import ApiError
from engine.serve.fields import SamplingFields, params_of, structure_in
from engine.serve.run import Run
from engine.serve.serving import Serving
from engine.serve.wording import new_id, now, progress_entry, timings


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

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_reasoning_tokens: int | None = None


def router(serving: Serving) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    @routes.post("/responses")
    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesBody)
        structure = structure_in(body, text_format=(body.text or {}).get("format"))
        messages = messages_of(body)
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
        names |= answer_names(tools, body.tool_choice, body.parallel_tool_calls, body.max_reasoning_tokens)
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
            error_event=lambda value: named_event("error", {"type": "error", **value["error"]}),
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
        self._message_id = new_id("msg_")
        self._reasoning_id = new_id("rs_")
        self._created = now()
        self._number = -1

    def _response(self, result: GenerationResult | None) -> dict[str, Any]:
        """The response object, before or after the end."""
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
        if result.reasoning:
            value["output"].append(self._reasoning_item(result.reasoning))
        if result.text or not result.tool_calls:
            value["output"].append(self._message_item(result.text, "completed"))
        value["output"] += [_call_item(call, "completed") for call in result.tool_calls]
        value["usage"] = {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens},
            "output_tokens": stats.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": stats.prompt_tokens + stats.output_tokens,
        }
        return value

    def _message_item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _reasoning_item(self, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [{"type": "reasoning_text", "text": text}]
        return {"id": self._reasoning_id, "type": "reasoning", "summary": [], "content": content}

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
        item = -1
        pending: list[ToolCall] = []  # told behind the text, as one item is open at a time
        thinking = speaking = closed = called = False
        async for told in self._run.events(progress=self._body.return_progress):
            timed = self._body.timings_per_token
            if isinstance(told, PromptProgress):
                entry = progress_entry(told, timed=timed)
                yield self._event("response.in_progress", response=self._response(None), **entry)
                continue
            chunk = told.chunk
            extra = {"timings": timings(self._run.stats(0))} if timed else {}
            if chunk.reasoning and not speaking:
                if not thinking:
                    thinking, item = True, item + 1
                    yield self._event("response.output_item.added", output_index=item, item=self._reasoning_item(None))
                place = {"item_id": self._reasoning_id, "output_index": item, "content_index": 0}
                yield self._event("response.reasoning_text.delta", **place, delta=chunk.reasoning, **extra)
            last = chunk.finish_reason is not None and not called and not chunk.tool_calls
            if (chunk.text or last) and not speaking:
                if thinking and not closed:
                    closed = True
                    for one in self._close_reasoning(item):
                        yield one
                speaking, item = True, item + 1
                yield self._event(
                    "response.output_item.added", output_index=item, item=self._message_item(None, "in_progress")
                )
                place = {"item_id": self._message_id, "output_index": item, "content_index": 0}
                yield self._event("response.content_part.added", **place, part=_part(""))
            if chunk.text:
                place = {"item_id": self._message_id, "output_index": item, "content_index": 0}
                yield self._event("response.output_text.delta", **place, delta=chunk.text, logprobs=[], **extra)
            for call in chunk.tool_calls:
                if thinking and not closed:
                    closed = True
                    for one in self._close_reasoning(item):
                        yield one
                pending.append(call)
                called = True
        result = self._run.streams[0].folded()
        if speaking:
            for one in self._close_message(item, result.text):
                yield one
        for call in pending:
            item += 1
            begun = _call_item(replace(call, arguments=""), "in_progress")
            done = _call_item(call, "completed")
            place = {"item_id": done["id"], "output_index": item}
            yield self._event("response.output_item.added", output_index=item, item=begun)
            yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            yield self._event(
                "response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name
            )
            yield self._event("response.output_item.done", output_index=item, item=done)
        # Also where the status is "incomplete": clients wait for this event, and read the status from the response.
        yield self._event("response.completed", response=self._response(result), timings=timings(result.stats))

    def _close_message(self, item: int, text: str) -> list[bytes]:
        place = {"item_id": self._message_id, "output_index": item, "content_index": 0}
        done = self._message_item(text, "completed")
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text)),
            self._event("response.output_item.done", output_index=item, item=done),
        ]

    def _close_reasoning(self, item: int) -> list[bytes]:
        text = self._run.streams[0].reasoning
        place = {"item_id": self._reasoning_id, "output_index": item, "content_index": 0}
        return [
            self._event("response.reasoning_text.done", **place, text=text),
            self._event("response.output_item.done", output_index=item, item=self._reasoning_item(text)),
        ]


def _call_item(call: ToolCall, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
