"""What an answer of a chat has to keep to: which tools may be called in which form, and how long a thought may be.

Descriptions alone; engine/constraints makes masks of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequestError
from engine.text.answers.call_form import CallForm
from engine.text.answers.call_stream import Sections
from engine.text.answers.formats import AnswerFormat
from engine.text.answers.parser import AnswerParser
from engine.text.answers.tool_calls import Types

CHOICES = ("auto", "none", "required")
MAX_TOOLS = 1024
"""Of one request. Grammars of calls have room for some thousands of parameters in all."""

_NAME = re.compile(r"[\w.:/-]{1,128}")
_COMBINING = ("anyOf", "oneOf", "allOf", "patternProperties", "$ref", "if")


@dataclass(frozen=True)
class CallRules:
    """Calls that an answer may have.

    Attributes:
        form: how they are written.
        tools: the functions that may be called: name, and the JSON schema of the arguments as text.
        forced: whether the answer is calls and nothing else.
        several: whether there may be more than one.
    """

    form: CallForm
    tools: tuple[tuple[str, str], ...]
    forced: bool = False
    several: bool = True


@dataclass(frozen=True)
class AnswerRules:
    """All that the tokens of an answer are held to.

    Attributes:
        markers: how the model marks reasoning and calls.
        prompt: the end of the prompt.
        types: types of the parameters of the tools.
        shown_ids: control tokens that appear in the text by name.
        calls: None: nothing is asked of them.
        max_reasoning: tokens of reasoning at most; None: any number.
        reasoning_end: what the model writes to end its reasoning.
        not_after_end: a word that may not follow that.
    """

    markers: AnswerFormat
    prompt: str = field(repr=False)
    types: Types = field(repr=False)
    shown_ids: Collection[int]
    calls: CallRules | None = None
    max_reasoning: int | None = None
    reasoning_end: str = ""
    not_after_end: str = ""

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        return AnswerParser(self.markers, self.prompt, self.types, sections=self.sections())

    def sections(self) -> Sections | None:
        """What reads calls as they are written; None where nothing is asked of them."""
        calls = self.calls
        return Sections(calls.form, [name for name, _ in calls.tools], self.types) if calls is not None else None


@dataclass(frozen=True)
class ToolChoice:
    """What a caller asks about tools, checked.

    Attributes:
        tools: that the template is given.
        callable: names of those that may be called.
        forced: whether one must be called.
        several: whether several may be called in one answer.
    """

    tools: list[dict[str, Any]]
    callable: frozenset[str]
    forced: bool
    several: bool


def choose_tools(tools: Sequence[Mapping[str, Any]], choice: Any, parallel: Any) -> ToolChoice | None:
    """Which tools may, must or must not be called; None where none may.

    Args:
        tools: in OpenAI's form, {"type": "function", "function": {...}}, or the inner mappings alone.
        choice: None, "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.
        parallel: whether an answer may have several calls; None is True.

    Raises:
        InvalidRequestError: too many tools, one without a proper name, a choice that does not exist or names no tool.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} functions; allowed: at most {MAX_TOOLS}")
    names = [_name(tool, index) for index, tool in enumerate(tools)]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequestError(f"tools has two functions named {twice!r}; give each a name of its own")
    if parallel not in (None, True, False):
        raise InvalidRequestError(f"parallel_tool_calls is {parallel!r}; allowed: True or False")
    named = _named(choice)
    if named is not None:
        if named not in names:
            raise InvalidRequestError(
                f"tool_choice names the function {named!r}; the tools of the request: {', '.join(names) or 'none'}"
            )
        return ToolChoice(list(map(dict, tools)), frozenset([named]), forced=True, several=False)
    if choice not in (None, *CHOICES):
        raise InvalidRequestError(
            f"tool_choice is {choice!r}; allowed: {', '.join(CHOICES)}, or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if choice == "required" and not names:
        raise InvalidRequestError("tool_choice is 'required' but the request has no tools")
    if choice == "none" or not names:
        return None
    return ToolChoice(list(map(dict, tools)), frozenset(names), choice == "required", parallel is not False)


def argument_schemas(choice: ToolChoice) -> tuple[tuple[str, str], ...]:
    """Names of the functions that may be called, each with the JSON schema of its arguments."""
    found = []
    for tool in choice.tools:
        function = _function(tool)
        if function["name"] in choice.callable:
            strict = function.get("strict", tool.get("strict"))
            schema = _arguments(function.get("parameters"), function["name"])
            if strict is False:
                schema = {**schema, "x-guidance": {"lenient": True}}
            found.append((function["name"], json.dumps(schema, ensure_ascii=False)))
    return tuple(found)


def _arguments(schema: Any, name: str) -> dict[str, Any]:
    """The schema of a function's arguments: always an object, and with no other names than those that it lists."""
    if schema is None:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"the parameters of the tool {name!r} are {schema!r}; allowed: a JSON schema")
    made: dict[str, Any] = {"type": "object", **schema}
    if not any(key in made for key in _COMBINING):
        made.setdefault("properties", {})
        made.setdefault("additionalProperties", False)
    return made


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _name(tool: Mapping[str, Any], index: int) -> str:
    name = _function(tool).get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"tools[{index}] has the name {name!r}; allowed: 1 to 128 letters, digits and the signs _ - . : /"
        )
    return name


def _named(choice: Any) -> str | None:
    """The function that a choice names."""
    if not isinstance(choice, Mapping) or choice.get("type", "function") != "function":
        return None
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else function
    return name if isinstance(name, str) else None
