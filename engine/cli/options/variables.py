"""Options of a conversation: --chat-var NAME=VALUE → names for a chat template, and a prompt → what the user says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path

_TAKEN = ("messages", "params", "self")
_WORDS = {"None": None} | {word: value for value in (True, False) for word in (str(value), str(value).upper())}


def parse_variables(entries: list[str] | None) -> dict[str, Any]:
    """Names and values: JSON where a value is JSON (false, 3, "text", a list of tools), else the text itself.

    Raises:
        InvalidRequestError: an entry has another form, or a name that is taken.
    """
    return dict(_parse(entry) for entry in entries or ())


def _parse(entry: str) -> tuple[str, Any]:
    name, separator, text = entry.partition("=")
    name = name.strip()
    if not separator or not name.isidentifier():
        raise InvalidRequestError(f"--chat-var is {entry!r}; it has the form NAME=VALUE, as enable_thinking=false")
    if name in _TAKEN:
        raise InvalidRequestError(f"--chat-var cannot set {name}: the conversation itself is behind that name")
    if text.strip() in _WORDS:
        return name, _WORDS[text.strip()]
    try:
        return name, json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return name, text


def _no_number(text: str) -> None:
    """NaN and Infinity, which Python takes for numbers and JSON does not have."""
    raise ValueError(text)


@dataclass(frozen=True)
class Talk:
    """A prompt that goes through the chat template."""

    messages: list[dict[str, str]]
    variables: dict[str, Any]

    @classmethod
    def of(
        cls,
        text: str | list[int],
        chat: bool | None,
        system: str | None,
        template_file: Path | None,
        chat_var: list[str] | None,
    ) -> Talk | None:
        """The conversation that the options ask for; None where the prompt is a text to continue."""
        variables = parse_variables(chat_var)
        given = {"--system": system, "--chat-template-file": template_file, "--chat-var": chat_var}
        names = [name for name, value in given.items() if value is not None]
        if chat is False and names:
            raise InvalidRequestError(f"{names[0]} is for conversations; leave it out, or --no-chat")
        if not chat and not names:
            return None
        if not isinstance(text, str):
            raise InvalidRequestError("--prompt-ids are given to the model as they are: they cannot be part of a chat")
        start = [] if system is None else [{"role": "system", "content": system}]
        return cls([*start, {"role": "user", "content": text}], variables)
