"""Tools for a model whose chat template has no place for them: they are told in the system message, calls as text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.answers.call_form import CallForm
from engine.text.answers.call_forms import sample_of
from engine.text.templates.messages import checked_messages


def with_tools(messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """The conversation with the tools in its system message, and with calls and results as text.

    Args:
        messages: the conversation.
        tools: descriptions of the tools.
        form: how calls are written.
    """
    told: list[dict[str, Any]] = []
    for message in checked_messages(messages):
        if message.get("tool_calls"):
            calls = "\n".join(
                sample_of(form, call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))
                for call in message["tool_calls"]
            )
            text = message.get("content")
            content = f"{text}\n{calls}" if isinstance(text, str) and text else calls
            told.append({"role": "assistant", "content": content})
        elif message["role"] == "tool":
            told.append({"role": "user", "content": f"Result of the tool:\n{_text(message.get('content'))}"})
        else:
            told.append(message)
    words = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    system = (
        f"You can call these functions, each described by a JSON schema:\n{words}\n"
        f"To call one, write nothing but this form, with its name and its arguments:\n"
        f"{sample_of(form, 'NAME', '{...}')}"
    )
    if told and told[0]["role"] == "system":
        return [{"role": "system", "content": f"{_text(told[0]['content'])}\n\n{system}"}, *told[1:]]
    return [{"role": "system", "content": system}, *told]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
