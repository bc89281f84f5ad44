"""Calls of tools in Ollama's form: arguments are objects, results follow calls by name and order. Knows no models."""

from __future__ import annotations

from collections import deque
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
    waiting = _Waiting([])
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
            waiting = _Waiting([(_function_name(call), call["id"]) for call in one["tool_calls"]])
        elif one.get("role") == "tool":
            name = one.pop("tool_name", None) or one.get("name")
            if name is not None:
                one["name"] = name
            answered = waiting.take(name)
            if answered is not None:
                one.setdefault("name", answered[0])
                one.setdefault("tool_call_id", answered[1])
        made.append(one)
    return made


class _Waiting:
    """Calls without a result.

    A list that is searched takes minutes for a hundred thousand calls and as many results.

    Args:
        calls: their names and ids, in order.
    """

    def __init__(self, calls: Sequence[tuple[str, str]]) -> None:
        self._calls = calls
        self._answered = [False] * len(calls)
        self._places: dict[str | None, deque[int]] = {None: deque(range(len(calls)))}
        for place, (name, _) in enumerate(calls):
            self._places.setdefault(name, deque()).append(place)

    def take(self, name: Any) -> tuple[str, str] | None:
        """The first call of a function, or of any, which waits no longer; None where there is none."""
        places = self._places.get(name, deque()) if name is None or isinstance(name, str) else deque()
        while places:
            place = places.popleft()
            if not self._answered[place]:
                self._answered[place] = True
                return self._calls[place]
        return None


def _function_name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name")) if isinstance(function, dict) else ""
