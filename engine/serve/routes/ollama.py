"""Ollama's API: /api/chat and /api/generate, and the lists of models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response

from engine import __version__
from engine.api.llm import LLM
from engine.request import GenerationResult, GenerationStats, ToolCall
from engine.serve.answers.long_work import off_loop
from engine.serve.answers.ollama_calls import call_entry, with_ids
from engine.serve.answers.respond import respond
from engine.serve.answers.wording import now
from engine.serve.errors import ApiError, dump, json_response
from engine.serve.fields.body import Body, Objects, parse_body, read_body
from engine.serve.fields.conversations import answer_names, is_continued, prompt_of, template_names
from engine.serve.fields.sampling import SamplingFields, params_of, structure_in
from engine.serve.models.model_store import ServedModel
from engine.serve.routes.models import chat_source
from engine.serve.run import Run
from engine.serve.serving import Serving


class Named(Body):
    """A model by either of its keys."""

    model: str | None = None
    name: str | None = None


class AskBody(Body):
    """What chats and texts have in common."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"images": ([],)}

    model: str | None = None
    stream: bool = True
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    format: Any = None


class ChatBody(AskBody):
    """The fields of /api/chat; those about the choice of tools are OpenAI's, as Ollama has none."""

    messages: list[Any] | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class GenerateBody(AskBody):
    """The fields of /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    suffix: str | None = None


def router(serving: Serving) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    @routes.get("/api/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @routes.get("/api/tags")
    async def tags() -> Response:
        return json_response({"models": [_entry(one) for one in serving.store.models]})

    @routes.get("/api/ps")
    async def ps() -> Response:
        opened = [one for one in serving.store.models if one.llm is not None]
        return json_response({"models": [{**_entry(one), "size_vram": 0, "expires_at": None} for one in opened]})

    @routes.post("/api/show")
    async def show(request: Request) -> Response:
        body = await read_body(request, Named)
        model = await serving.store.acquire(body.model or body.name)
        try:
            return json_response(_show(model))
        finally:
            serving.store.release(model)

    @routes.post("/api/chat")
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        if not body.messages:
            return await _load_only(serving, body.model, {"message": {"role": "assistant", "content": ""}})
        continued = is_continued(body.messages, None, None)
        messages = await off_loop(len(body.messages), partial(with_ids, body.messages))
        return await _answer(request, serving, body, messages, continued)

    @routes.post("/api/generate")
    async def generate(request: Request) -> Response:
        body = await read_body(request, GenerateBody)
        if body.suffix:
            raise ApiError(400, "suffix is not supported by this server yet", param="suffix")
        if not body.prompt:
            return await _load_only(serving, body.model, {"response": ""})
        start = [] if body.system is None else [{"role": "system", "content": body.system}]
        messages = None if body.raw else [*start, {"role": "user", "content": body.prompt}]
        return await _answer(request, serving, body, messages, False)

    return routes


async def _load_only(serving: Serving, name: str | None, value: dict[str, Any]) -> Response:
    """Ollama's way to open a model: a request that asks nothing."""
    model = await serving.store.acquire(name)
    serving.store.release(model)
    return json_response(
        {"model": model.spec.name, "created_at": _stamp(), **value, "done": True, "done_reason": "load"}
    )


async def _answer(
    request: Request, serving: Serving, body: ChatBody | GenerateBody, messages: list[Any] | None, continued: bool
) -> Response:
    """Answer a conversation, or continue a text where there is none."""
    # The other options have the names that llama.cpp uses; they are checked like any other fields.
    options = dict(body.options or {})
    if "num_predict" in options:
        options["n_predict"] = _length(options.pop("num_predict"))
    raw = json.dumps({**options, "stream": body.stream}).encode()
    fields = parse_body(raw, SamplingFields, request.url.path)
    effort = body.think if isinstance(body.think, str) else None
    names = template_names(serving.settings.template_variables, None, effort)
    if isinstance(body.think, bool):
        names["enable_thinking"] = body.think
    if isinstance(body, ChatBody):
        names |= answer_names(body.tools, body.tool_choice, body.parallel_tool_calls, None)
    structure = structure_in(fields, format=body.format)
    run = Run(serving, body.model)

    async def start() -> None:
        llm = run.llm.llm
        params = params_of(fields, serving.settings, llm, n=1, constraint=structure.constraint)
        text = body.prompt if isinstance(body, GenerateBody) else ""
        # Without a template a text is continued, as Ollama does with models that have none.
        if messages is None or (isinstance(body, GenerateBody) and not chat_source(llm)):
            await run.start([text], params, field=structure.field)
            return
        prompt = await asyncio.to_thread(prompt_of, llm, messages, names, continued=continued)
        await run.start([prompt], params, field=structure.field)

    chat = isinstance(body, ChatBody)

    def part(text: str, reasoning: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        if chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if reasoning:
                message["thinking"] = reasoning
            if calls:
                message["tool_calls"] = [call_entry(call) for call in calls]
            return {"message": message}
        return {"response": text, "thinking": reasoning} if reasoning else {"response": text}

    def head() -> dict[str, Any]:
        return {"model": run.model.spec.name, "created_at": _stamp()}

    def whole(results: Sequence[GenerationResult]) -> dict[str, Any]:
        one = results[0]
        return {**head(), **part(one.text, one.reasoning, one.tool_calls), **_end(one.finish_reason, one.stats)}

    async def lines() -> AsyncIterator[bytes]:
        async for told in run.events():
            chunk = getattr(told, "chunk", None)
            if chunk is None:
                continue
            if chunk.text or chunk.reasoning or chunk.tool_calls:
                yield dump({**head(), **part(chunk.text, chunk.reasoning, chunk.tool_calls), "done": False}) + b"\n"
            if chunk.finish_reason is not None and chunk.stats is not None:
                yield dump({**head(), **part("", ""), **_end(chunk.finish_reason, chunk.stats)}) + b"\n"

    return await respond(request, serving, run, start, whole, lines() if body.stream else None, lines=True)


def _length(given: Any) -> Any:
    """Tokens to generate; -1 and -2 both mean as many as fit."""
    return -1 if given == -2 else given


def _end(reason: str, stats: GenerationStats) -> dict[str, Any]:
    """What the last line adds; times are in nanoseconds."""
    seconds = (stats.queue_seconds, stats.prompt_seconds, stats.decode_seconds)
    return {
        "done": True,
        "done_reason": reason,
        "total_duration": int(sum(seconds) * 1e9),
        "load_duration": int(stats.queue_seconds * 1e9),
        "prompt_eval_count": stats.prompt_tokens,
        "prompt_eval_duration": int(stats.prompt_seconds * 1e9),
        "eval_count": stats.output_tokens,
        "eval_duration": int(stats.decode_seconds * 1e9),
    }


def _stamp(seconds: float | None = None) -> str:
    return datetime.fromtimestamp(now() if seconds is None else seconds, UTC).isoformat().replace("+00:00", "Z")


def _entry(model: ServedModel) -> dict[str, Any]:
    path = model.spec.path
    size = path.stat().st_size if path is not None else 0
    return {
        "name": model.spec.name,
        "model": model.spec.name,
        "modified_at": _stamp(path.stat().st_mtime if path is not None else model.created),
        "size": size,
        "digest": "",
        "details": _details(model.llm.llm if model.llm is not None else None),
    }


def _details(llm: LLM | None) -> dict[str, Any]:
    family = "" if llm is None else llm.model.config.architecture
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": "",
        "quantization_level": "",
    }


def _show(model: ServedModel) -> dict[str, Any]:
    llm = model.open_llm.llm
    config = llm.model.config
    return {
        "modelfile": "",
        "parameters": "",
        "template": chat_source(llm),
        "details": _details(llm),
        "model_info": {
            "general.architecture": config.architecture,
            "general.basename": config.name,
            f"{config.architecture}.context_length": config.context_length,
            f"{config.architecture}.embedding_length": config.width,
        },
        "capabilities": _capabilities(llm),
    }


def _capabilities(llm: LLM) -> list[str]:
    if not llm.model.config.generates:
        return ["embedding"]
    return ["completion", "tools"] if chat_source(llm) else ["completion"]
