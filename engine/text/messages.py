"""Checks a conversation before a template sees it, and gives it the shape templates expect.

This module knows nothing of templates or tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequestError


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, content joined to one string, tool-call arguments parsed.

    Args:
        messages: mappings with "role" (a string) and "content" (a string, None beside "tool_calls", or a list of
            `{"type": "text", "text": …}` parts). Other keys are passed on.

    Raises:
        InvalidRequestError: names the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of mappings like {{'role': 'user', 'content': 'Hi'}}, found "
            f"{type(messages).__name__}"
        )
    if not messages:
        raise InvalidRequestError("messages is empty; a conversation needs at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Copies of the tool descriptions; None for None or an empty list.

    Raises:
        InvalidRequestError: `tools` is not a list of mappings.
    """
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequestError(f"tools must be a list of mappings (JSON schemas), found {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{index}] must be a mapping (a JSON schema), found {type(tool).__name__}")
    return [dict(tool) for tool in tools] or None


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"{where} must be a mapping with 'role' and 'content', found {type(message).__name__}"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{where}['role'] must be a string such as 'user', 'assistant' or 'system': {role!r}")
    checked = dict(message)
    if "content" not in checked and not checked.get("tool_calls"):
        raise InvalidRequestError(f"{where} has no 'content'; only a message with 'tool_calls' may go without")
    checked["content"] = _content(checked.get("content"), bool(checked.get("tool_calls")), where)
    if checked.get("tool_calls"):
        checked["tool_calls"] = _tool_calls(checked["tool_calls"], where)
    return checked


def _content(content: Any, may_be_none: bool, where: str) -> str | None:
    if isinstance(content, str) or (content is None and may_be_none):
        return content
    if isinstance(content, (list, tuple)):
        return "\n".join(_part(part, f"{where}['content'][{index}]") for index, part in enumerate(content))
    raise InvalidRequestError(
        f"{where}['content'] must be a string or a list of text parts, found {type(content).__name__}"
    )


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(text := part.get("text"), str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidRequestError(f"{where} is of type {kind!r}; only {{'type': 'text', 'text': …}} is supported")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRequestError(f"{where}['tool_calls'] must be a list of mappings")
    return [_tool_call(dict(call)) for call in calls]


class Arguments(dict[str, Any]):
    """Arguments of a tool call: a mapping to templates that look inside, JSON text to those that add it to a text.

    Args:
        values: the mapping.
        text: the JSON text that the caller gave, where it was text.
    """

    def __init__(self, values: Mapping[str, Any], text: str | None = None) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return repr(self) if self._text is None else self._text

    def _json(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self._text is None else self._text

    def __add__(self, other: str) -> str:
        return self._json() + other

    def __radd__(self, other: str) -> str:
        return other + self._json()


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """The HTTP API sends arguments as JSON text; most templates want the mapping itself, some the text."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    given = function.get("arguments")
    text = given if isinstance(given, str) else None
    if text is not None:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return call
    if isinstance(given, Mapping):
        call["function"] = {**function, "arguments": Arguments(given, text)}
    return call
