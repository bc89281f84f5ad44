"""Checks a conversation before a template sees it, and brings what callers write differently to one form.

`message_shape.py` then gives it the shape that a template takes. Independent of templates and tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequestError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which callers and templates keep what the model thought before it answered."""

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages in one form: content a string, a list of text parts or None, tool-call arguments parsed.

    Keys without a value (None, and an empty list of calls) are left out, "content" apart; reasoning that comes as a
    part of the content becomes "reasoning_content".

    Args:
        messages: mappings with "role" (a string) and "content" (a string, a list of `{"type": "text", "text": …}`
            parts, or None; beside "tool_calls" or reasoning it may be missing). Other keys are passed on.

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
    checked = {key: value for key, value in message.items() if value is not None}
    for key in REASONING_KEYS:
        if checked.get(key) == "":
            del checked[key]
    content = _content(checked.pop("content", None), where)
    if isinstance(content, list):
        content = _without_reasoning(content, checked)
    if "tool_calls" in checked:
        calls = _tool_calls(checked.pop("tool_calls"), where)
        if calls:
            checked["tool_calls"] = calls
    if "content" not in message and "tool_calls" not in message and not any(key in checked for key in REASONING_KEYS):
        raise InvalidRequestError(
            f"{where} has no 'content'; only a message with 'tool_calls' or 'reasoning_content' may go without it"
        )
    checked["content"] = content
    return checked


def _content(content: Any, where: str) -> str | list[dict[str, Any]] | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return [_part(part, f"{where}['content'][{index}]") for index, part in enumerate(content)]
    raise InvalidRequestError(
        f"{where}['content'] must be a string or a list of text parts, found {type(content).__name__}"
    )


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part as {"type": "text" or "reasoning", "text": ...}."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind in _TEXT_PARTS and "text" in part and (part["text"] is None or isinstance(part["text"], str)):
        return {"type": "text", "text": part["text"] or ""}
    if kind in _REASONING_PARTS:
        for key in (*REASONING_KEYS, "text"):
            text = part.get(key)
            if isinstance(text, (list, tuple)):  # the parts of a part
                text = "".join(_part(inner, where)["text"] for inner in text)
            if isinstance(text, str):
                return {"type": "reasoning", "text": text}
    raise InvalidRequestError(f"{where} is of type {kind!r}; only {{'type': 'text', 'text': …}} is supported")


def _without_reasoning(parts: list[dict[str, Any]], message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The text parts; those of reasoning go into the message under their own key."""
    thought = "\n".join(part["text"] for part in parts if part["type"] == "reasoning")
    if thought and not any(key in message for key in REASONING_KEYS):
        message["reasoning_content"] = thought
    return [part for part in parts if part["type"] == "text"] or None


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRequestError(f"{where}['tool_calls'] must be a list of mappings")
    return [_tool_call({key: value for key, value in call.items() if value is not None}) for call in calls]


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
    """The HTTP API sends arguments as JSON text; most templates take the mapping itself, some the text.

    No arguments at all, empty text and null are the empty mapping.
    """
    function = call.get("function")
    if not isinstance(function, Mapping):
        if "name" not in call or "arguments" not in call:
            return call
        return {**call, "arguments": _arguments(call["arguments"])}  # without the wrapping, as some templates take it
    call["function"] = {**function, "arguments": _arguments(function.get("arguments"))}
    return call


def _arguments(given: Any) -> Any:
    """Arguments where they are a mapping or nothing; anything else as it is."""
    value = given
    if isinstance(given, str):
        if not given.strip():
            return Arguments({})
        try:
            value = json.loads(given)
        except (ValueError, RecursionError):
            return given
    if value is None or (isinstance(value, str) and not value.strip()):
        return Arguments({})
    if isinstance(value, Mapping):
        return Arguments(value, given if isinstance(given, str) else None)
    return given
