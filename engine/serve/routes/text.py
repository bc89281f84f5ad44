"""POST /tokenize, /detokenize and /apply-template: text and token ids without a model's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from engine.api.llm import LLM
from engine.serve.answers.long_work import written
from engine.serve.fields.body import Body, Integers, read_body
from engine.serve.fields.conversations import answer_names, is_continued, prompt_of, template_names
from engine.serve.routes.chat import ChatBody
from engine.serve.serving import Serving

T = TypeVar("T")


class TokenizeBody(Body):
    """The fields of /tokenize: llama.cpp's, and vLLM's prompt or messages."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """The fields of /detokenize."""

    model: str | None = None
    tokens: Integers = Field(default_factory=list)


def router(serving: Serving) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody)
        return await with_model(serving, body.model, lambda llm: written(_tokenized(llm, body, serving)))

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody)

        def answer(llm: LLM) -> Response:
            text = llm.tokenizer.decode(body.tokens)
            return written({"content": text, "prompt": text})

        return await with_model(serving, body.model, answer)

    @routes.post("/apply-template")
    async def apply_template(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        continued = is_continued(body.messages, body.continue_final_message, body.add_generation_prompt)
        names = template_names(serving.settings.template_variables, body.chat_template_kwargs, body.reasoning_effort)
        told = answer_names(body.tools, body.tool_choice, body.parallel_tool_calls, body.max_reasoning_tokens)

        def prompt(llm: LLM) -> str:
            if body.add_generation_prompt is False and not continued:
                template = llm.require_chat_template()
                return template.render(body.messages, tools=told.get("tools"), add_generation_prompt=False, **names)
            return prompt_of(llm, body.messages, names | told, continued=continued).text

        return await with_model(serving, body.model, lambda llm: written({"prompt": prompt(llm)}))

    return routes


async def with_model(serving: Serving, name: str | None, work: Callable[[LLM], T]) -> T:
    """What work() makes of an open model, in a thread."""
    model = await serving.store.acquire(name)
    try:
        return await asyncio.to_thread(work, model.open_llm.llm)
    finally:
        serving.store.release(model)


def _tokenized(llm: LLM, body: TokenizeBody, serving: Serving) -> dict[str, Any]:
    """llama.cpp's answer, which adds special tokens on request, or vLLM's, which adds them unless told otherwise."""
    if body.messages is not None:
        names = template_names(serving.settings.template_variables, body.chat_template_kwargs, None)
        ids = list(prompt_of(llm, body.messages, names).token_ids)
    else:
        text = body.prompt if body.content is None else body.content
        wanted = (body.add_special, body.add_special_tokens, body.content is None and body.prompt is not None)
        special = next(one for one in wanted if one is not None)
        ids = llm.tokenizer.encode(text or "", add_special=special, parse_special=body.parse_special)
    tokens: list[Any] = list(ids)
    if body.with_pieces:
        tokens = [{"id": token_id, "piece": _piece(llm, token_id)} for token_id in ids]
    return {"tokens": tokens, "count": len(ids), "max_model_len": llm.context_length}


def _piece(llm: LLM, token_id: int) -> str | list[int]:
    """The text of a token; its bytes where they are part of a character."""
    raw = llm.tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
