"""Fields and steps that all chats share: messages to a prompt, the names for the template, an answer to continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.api.llm import LLM
from engine.serve.errors import ApiError
from engine.text import ChatPrompt
from engine.text.answers.thoughts import BUDGETS


def template_names(defaults: dict[str, Any], variables: dict[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Names for the chat template: the server's, those of the request, and what its reasoning effort means.

    Raises:
        ApiError: an effort that does not exist, or a name that is taken.
    """
    names = {**defaults, **(variables or {})}
    if effort is not None:
        if effort not in BUDGETS:
            raise ApiError(
                400,
                f"reasoning_effort is {effort!r}; allowed: {', '.join(BUDGETS)}",
                param="reasoning_effort",
                code="invalid_value",
            )
        names.setdefault("reasoning_effort", effort)
        names.setdefault("enable_thinking", effort != "none")
    for taken in ("messages", "add_generation_prompt"):
        if taken in names:
            raise ApiError(
                400, f"chat_template_kwargs cannot set {taken}", param="chat_template_kwargs", code="invalid_value"
            )
    return names


def answer_names(
    tools: Any, choice: Any, parallel: bool | None, budget: int | None, thoughts: str | None = None
) -> dict[str, Any]:
    """What a request says about tools and reasoning, by the names of LLM.chat(); without what it does not say."""
    given = {
        "tools": tools or None,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "max_reasoning_tokens": budget,
        "reasoning_format": thoughts,
    }
    return {name: value for name, value in given.items() if value is not None}


def prompt_of(llm: LLM, messages: Sequence[Any], names: dict[str, Any], *, continued: bool = False) -> ChatPrompt:
    """The prompt of a conversation; runs in a thread, as templates and long texts take their time.

    Args:
        llm: the model.
        messages: the conversation.
        names: for the template.
        continued: the last message is an answer that the model goes on with.
    """
    if not continued:
        return llm.chat_prompt(messages, **names)
    *before, last = messages
    begun = _text(last.get("content"))
    prompt = llm.chat_prompt(before, **names)
    text = prompt.text + begun
    return replace(
        prompt, text=text, token_ids=tuple(llm.tokenizer.encode_rendered(text)), begins_thoughts=not begun.strip()
    )


def is_continued(messages: Any, continue_final: bool | None, add_prompt: bool | None) -> bool:
    """Whether the answer goes on with the last message: an answer at the end that the caller does not forbid.

    Raises:
        ApiError: contradicting wishes, or two answers at the end.
    """
    if continue_final and add_prompt:
        raise ApiError(
            400,
            "add_generation_prompt and continue_final_message exclude each other",
            param="continue_final_message",
            code="invalid_value",
        )
    roles = [one.get("role") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    ends = bool(roles) and roles[-1] == "assistant" and len(roles) == len(messages)
    if continue_final and not ends:
        raise ApiError(
            400,
            "continue_final_message needs a last message of the assistant",
            param="continue_final_message",
            code="invalid_value",
        )
    if not ends or add_prompt or continue_final is False or len(roles) < 2:
        return False
    if roles[-2] == "assistant":
        raise ApiError(400, "messages ends with two answers of the assistant", param="messages", code="invalid_value")
    return not messages[-1].get("tool_calls")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
