"""Calls of tools in Ollama's form: arguments are objects, results follow calls by name and order. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.request import ToolCall
from engine.serve.answers.wording import whole_part
from engine.text.answers.tool_calls import call_id


def call_entry(call: ToolCall) -> dict[str, Any]:
    """A call in Ollama's form, whose arguments are an object: of one that was cut off, what there is of it."""
    return {"id": call.id, "function": {"name": call.name, "arguments": whole_part(call.arguments)}}


def with_ids(messages: Sequence[Any]) -> list[Any]:
    """A conversation with ids for calls and results that have none: Ollama's clients go by names and by order."""
    made: list[Any] = []
    waiting: list[tuple[str, str]] = []  # names and ids of calls without a result
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            made.append(message)
            continue
        one, calls = dict(message), message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
            one["tool_calls"] = [
                {"type": "function", **call, "id": call.get("id") or call_id(f"message {number}", index)}
                for index, call in enumerate(calls)
            ]
            waiting = [(_function_name(call), call["id"]) for call in one["tool_calls"]]
        elif one.get("role") == "tool":
            name = one.pop("tool_name", None) or one.get("name")
            if name is not None:
                one["name"] = name
            answered = next((call for call in waiting if name in (None, call[0])), None)
            if answered is not None:
                waiting.remove(answered)
                one.setdefault("name", answered[0])
                one.setdefault("tool_call_id", answered[1])
        made.append(one)
    return made


def _function_name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name")) if isinstance(function, dict) else ""
