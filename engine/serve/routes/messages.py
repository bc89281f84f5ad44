"""POST /v1/messages and /v1/messages/count_tokens: conversations in Anthropic's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from engine.request import CallPart, GenerationResult, GenerationStats
from engine.serve.answers.long_work import off_loop
from engine.serve.answers.respond import named_event, respond
from engine.serve.answers.wording import in_order, new_id, whole_part
from engine.serve.errors import ApiError, json_response
from engine.serve.fields.body import Body, Objects, Strings, read_body
from engine.serve.fields.conversations import answer_names, is_continued, prompt_of, template_names
from engine.serve.fields.sampling import FORMS, OTHER_SAMPLERS, make_params
from engine.serve.fields.structure import FIELDS, structure_of
from engine.serve.routes.text import with_model
from engine.serve.run import Run
from engine.serve.serving import Serving
from engine.text import ChatPrompt


class CountBody(Body):
    """The fields of /v1/messages/count_tokens."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **OTHER_SAMPLERS,
        **FORMS,
        **dict.fromkeys(FIELDS, ()),
        "mcp_servers": ([],),
        "container": (),
    }

    model: str | None = None
    messages: list[Any]
    system: str | Objects | None = None
    thinking: dict[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """The fields of /v1/messages."""

    max_tokens: int | None = None
    stream: bool = False
    timeout: float | None = Field(None, gt=0)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_sequences: Strings | None = None
    output_format: Any = None


def router(serving: Serving) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountBody)
        make = await off_loop(_size(body), partial(_prompt_maker, body, serving))
        prompt = await with_model(serving, body.model, make)
        return json_response({"input_tokens": len(prompt.token_ids)})

    @routes.post("/v1/messages")
    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody)
        form = (body.output_config or {}).get("format")
        structure = structure_of({"output_format": body.output_format, "output_config.format": form})
        make = await off_loop(_size(body), partial(_prompt_maker, body, serving))
        run = Run(serving, body.model, body.timeout)
        answer = _Answer(body, run)

        async def start() -> None:
            values = dict(serving.settings.sampling)
            names = {"stop": "stop_sequences"}
            for name in ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens"):
                value = getattr(body, name)
                if value is not None:
                    values[name] = value
            values.setdefault("max_tokens", serving.settings.max_tokens)
            values["stop"] = body.stop_sequences or ()
            values["constraint"] = structure.constraint
            params = make_params(values, names, run.llm.llm)
            await run.start([await asyncio.to_thread(make, run.llm.llm)], params, field=structure.field)

        return await respond(
            request,
            serving,
            run,
            start,
            answer.json,
            answer.events() if body.stream else None,
        )

    return routes


def _size(body: CountBody) -> int:
    """Messages and blocks of a conversation."""
    contents = (message.get("content") for message in body.messages if isinstance(message, dict))
    return len(body.messages) + sum(len(content) for content in contents if isinstance(content, list))


def _prompt_maker(body: CountBody, serving: Serving) -> Any:
    """A function that makes the prompt, after the messages have been checked."""
    messages = messages_of(body)
    continued = is_continued(messages, None, None)
    effort = (body.output_config or {}).get("effort")
    names = template_names(serving.settings.template_variables, body.chat_template_kwargs, effort)
    kind = (body.thinking or {}).get("type")
    if kind in ("enabled", "adaptive", "disabled"):
        names.setdefault("enable_thinking", kind != "disabled")
    names |= _about_tools(body)

    def make(llm: Any) -> ChatPrompt:
        return prompt_of(llm, messages, names, continued=continued)

    return make


def _about_tools(body: CountBody) -> dict[str, Any]:
    """Tools, the choice among them and the length of reasoning, by the names of LLM.chat().

    Raises:
        ApiError: a tool of the server's own, or a choice that does not exist.
    """
    tools = []
    for index, tool in enumerate(body.tools or []):
        if tool.get("type", "custom") != "custom":
            raise ApiError(
                400,
                f"tools[{index}] is of type {tool['type']!r}; only tools with an input_schema are supported",
                param="tools",
                code="unsupported_parameter",
            )
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        for key in ("description", "strict"):
            if key in tool:
                function[key] = tool[key]
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice or {}
    kind = choice.get("type", "auto")
    choices: dict[str, Any] = {
        "auto": None,
        "none": "none",
        "any": "required",
        "tool": {"type": "function", "function": {"name": choice.get("name")}},
    }
    if kind not in choices:
        raise ApiError(400, f"tool_choice is of type {kind!r}; allowed: {', '.join(choices)}", param="tool_choice")
    parallel = False if choice.get("disable_parallel_tool_use") else None
    thinking = body.thinking or {}
    budget = thinking.get("budget_tokens") if thinking.get("type") == "enabled" else None
    return answer_names(tools, choices[kind], parallel, budget)


def messages_of(body: CountBody) -> list[dict[str, Any]]:
    """The conversation in the form that templates take.

    Raises:
        ApiError: a block that is not supported, or something that is no message.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise ApiError(400, f"{where} needs the role user or assistant", param=where, code="invalid_value")
        content = message.get("content")
        made: dict[str, Any] = {"role": message["role"], "content": _text(content, where + ".content")}
        if isinstance(content, list):
            thought = "\n".join(str(block.get("thinking", "")) for block in content if block.get("type") == "thinking")
            if thought and message["role"] == "assistant":
                made["reasoning_content"] = thought
            calls = [_call(block) for block in content if block.get("type") == "tool_use"]
            if calls:
                made["tool_calls"] = calls
            results = [block for block in content if block.get("type") == "tool_result"]
            messages += [
                {
                    "role": "tool",
                    "tool_call_id": str(block.get("tool_use_id")),
                    "content": _text(block.get("content") or "", f"{where}.content"),
                }
                for block in results
            ]
            if results and not made["content"]:
                continue
        messages.append(made)
    return messages


def _call(block: dict[str, Any]) -> dict[str, Any]:
    """A block of a call as templates take it."""
    function = {"name": str(block.get("name")), "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False)}
    return {"id": str(block.get("id")), "type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    """The text of a message's blocks; those of thinking go elsewhere."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be text or a list of blocks", param=where, code="invalid_type")
    texts = []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "image":
            raise ApiError(400, f"{where}[{number}]: image input is not supported by this server", param=where)
        elif kind not in ("thinking", "redacted_thinking", "tool_use", "tool_result"):
            raise ApiError(
                400,
                f"{where}[{number}] is of type {kind!r}; text, thinking, tool_use and tool_result are supported",
                param=where,
                code="unsupported_parameter",
            )
    return "".join(texts)


class _Answer:
    """Puts one request's result into words."""

    def __init__(self, body: MessagesBody, run: Run) -> None:
        self._body = body
        self._run = run
        self._id = new_id("msg_")

    def json(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The whole answer."""
        result = results[0]
        content: list[dict[str, Any]] = []
        if result.reasoning:
            content.append({"type": "thinking", "thinking": result.reasoning, "signature": ""})
        if result.text or not result.tool_calls:
            content.append({"type": "text", "text": result.text})
        content += [_block(call.id, call.name, whole_part(call.arguments)) for call in result.tool_calls]
        reason, word = self._reason(result)
        return self._message(content, reason, word, _usage(result.stats))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, word: str | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._run.model.spec.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": word,
            "usage": usage,
        }

    def _reason(self, result: GenerationResult) -> tuple[str, str | None]:
        """Anthropic's word for the end, and the stop sequence where it was the only one that there was."""
        if result.finish_reason == "length":
            return "max_tokens", None
        if result.tool_calls:
            return "tool_use", None
        llm, stops = self._run.llm.llm, self._body.stop_sequences or []
        if stops and (not result.token_ids or result.token_ids[-1] not in llm.tokenizer.eog_ids):
            return "stop_sequence", stops[0] if len(stops) == 1 else None
        return "end_turn", None

    async def events(self) -> AsyncIterator[bytes]:
        """The answer piece by piece: each block opened, filled and closed."""
        prompt = self._run.streams[0].request.prompt_ids
        begun = {"input_tokens": len(prompt), "cache_read_input_tokens": 0, "output_tokens": 0}
        yield _event("message_start", message=self._message([], None, None, begun))
        index, kind, called = -1, "", False
        async for told in self._run.events():
            chunk = getattr(told, "chunk", None)
            if chunk is None:
                continue
            continued, begun_parts = in_order(chunk.call_parts)
            for part in continued:
                yield _arguments(index, part)
            for wanted, text in (("thinking", chunk.reasoning), ("text", chunk.text)):
                last = chunk.finish_reason is not None and not called and not chunk.call_parts
                if not text and not (wanted == "text" and last and kind != "text"):
                    continue
                if kind != wanted:
                    if kind:
                        yield _event("content_block_stop", index=index)
                    index, kind = index + 1, wanted
                    block = {"type": kind, kind: ""}
                    yield _event(
                        "content_block_start",
                        index=index,
                        content_block=block if kind == "text" else {**block, "signature": ""},
                    )
                if text:
                    yield _event("content_block_delta", index=index, delta={"type": f"{kind}_delta", kind: text})
            for part in begun_parts:
                if part.name is not None:
                    if kind:
                        yield _event("content_block_stop", index=index)
                    index, kind, called = index + 1, "tool_use", True
                    block = _block(part.id, part.name, {})
                    yield _event("content_block_start", index=index, content_block=block)
                if part.arguments:
                    yield _arguments(index, part)
        if kind:
            yield _event("content_block_stop", index=index)
        result = self._run.streams[0].folded()
        reason, word = self._reason(result)
        yield _event("message_delta", delta={"stop_reason": reason, "stop_sequence": word}, usage=_usage(result.stats))
        yield _event("message_stop")


def _block(id: str | None, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}


def _arguments(index: int, part: CallPart) -> bytes:
    delta = {"type": "input_json_delta", "partial_json": part.arguments}
    return _event("content_block_delta", index=index, delta=delta)


def _event(kind: str, **values: Any) -> bytes:
    return named_event(kind, {"type": kind, **values})


def _usage(stats: GenerationStats) -> dict[str, int]:
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_read_input_tokens": stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": stats.output_tokens,
    }
