"""Arguments of a call while they are written, as JSON text that only grows; and the patterns around them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from engine.text.answers.call_form import PLACES, CallForm
from engine.text.answers.element_arguments import ElementArguments
from engine.text.answers.literal_arguments import BRACED, PYTHON, LiteralArguments
from engine.text.answers.marker_search import inside, possible_beginning
from engine.text.answers.nested_values import TAG
from engine.text.answers.tool_calls import declared_type, value_of

_NAME = r"[\w.:/-]+"
_GROUPS = {
    "name": f"(?P<name>{_NAME})",
    "id": r"(?P<id>[\w.:-]+)",
    "index": r"(?P<index>\d+)",
    "key": r"""(?P<key>[^<>"|]+?)""",
    "type": r"(?P<type>\w+)",
}
_RAW = ("<![CDATA[", "]]>")
_SIGNS = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class Arguments(Protocol):
    """Arguments of one call, while they are written.

    Attributes:
        done: whether they have ended.
    """

    done: bool

    @property
    def in_value(self) -> bool:
        """Whether a string is open, where a marker is text."""

    def read(self, text: str) -> tuple[str, str]:
        """What is left of a text, and the JSON that it brings."""

    def close(self) -> str:
        """What is missing of the JSON at the end of the section."""


class JsonArguments:
    """Arguments that are one JSON object, passed on as they are.

    Attributes:
        done: whether it has ended.
        in_value: whether a string is open.
    """

    def __init__(self) -> None:
        self._depth = 0
        self.done = False
        self.in_value = False

    def read(self, text: str) -> tuple[str, str]:
        """What is left of a text, and what belongs to the object."""
        at = 0
        while not self.done:
            found = (_IN_STRING if self.in_value else _SIGNS).search(text, at)
            if found is None:
                return "", text
            at = found.end()
            sign = found[0]
            if sign == "\\":
                if at == len(text):  # what it escapes is not there yet
                    return text[at - 1 :], text[: at - 1]
                at += 1
            elif sign == '"':
                self.in_value = not self.in_value
            else:
                self._depth += 1 if sign in "{[" else -1
                self.done = self._depth <= 0
        return text[at:], text[:at]

    def close(self) -> str:
        """The end of the object, at the end of the section: it has none, or it was cut off."""
        return ""


class ParameterArguments:
    """Arguments that are written one by one, made into a JSON object.

    Attributes:
        done: whether the text behind the last one has come.
        in_value: whether a value is open.
    """

    def __init__(self, form: CallForm, types: Mapping[str, Any]) -> None:
        self._types = types
        self._heads, self._behind, self._end = _parameter_patterns(form)
        self._core = self._behind.strip()
        self._n = 0
        self._kind: object = None
        self._is_string = False
        self._is_new = False
        self.done = False
        self.in_value = False

    def read(self, text: str) -> tuple[str, str]:
        """What is left of a text, and the JSON that it brings."""
        written = ""
        while not self.done:
            text, more, goes_on = self._in_value(text) if self.in_value else self._between(text)
            written += more
            if not goes_on:
                break
        return text, written

    def close(self) -> str:
        """The end of the object, at the end of the section."""
        return "}" if not self.in_value and not self.done else ""

    def _between(self, text: str) -> tuple[str, str, bool]:
        found = next((head for one in self._heads if (head := one.match(text)) is not None), None)
        if found is not None:
            key = found["key"].strip()
            self._kind = declared_type(found[0]) or self._types.get(key)
            self._is_string, self._is_new, self.in_value = self._kind == "string", True, True
            self._core = self._behind.strip()
            begin = (", " if self._n else "") + json.dumps(key, ensure_ascii=False) + ": "
            self._n += 1
            return text[found.end() :], begin + ('"' if self._is_string else ""), True
        end = self._end.match(text) if self._end is not None else None
        if end is None:
            return text, "", False
        self.done = True
        return text[end.end() :], "}", False

    def _in_value(self, text: str) -> tuple[str, str, bool]:
        if self._is_new:
            if len(text) < len(_RAW[0]) and _RAW[0].startswith(text):
                return text, "", False
            self._is_new = False
            if self._is_string and text.startswith(_RAW[0]):
                text, self._core = text[len(_RAW[0]) :], _RAW[1] + self._core
        end = text.find(self._core)
        if end < 0:
            if not self._is_string:
                return text, "", False
            held = possible_beginning(text, (self._core, self._behind.rstrip()))
            ready, rest = text[: len(text) - held], text[len(text) - held :]
            return rest, inside(ready), False
        value, rest = text[:end], text[end + len(self._core) :]
        space = self._behind[: len(self._behind) - len(self._behind.lstrip())]
        value = value.removesuffix(space)
        self.in_value = False
        if self._is_string:
            return rest, inside(value) + '"', True
        return rest, json.dumps(value_of(value, self._kind), ensure_ascii=False), True


def arguments_of(form: CallForm, types: Mapping[str, Any]) -> Arguments:
    """A reader for the arguments of one call, from behind what comes before them in its form."""
    if not form.parameter:
        return JsonArguments()
    behind = form.call.partition("$arguments")[2]
    if form.quoted:
        return LiteralArguments(PYTHON)
    if form.tree is not None:
        return ElementArguments(behind, types) if TAG in form.parameter else LiteralArguments(BRACED)
    return ParameterArguments(form, types)


def pattern_of(text: str) -> str:
    """A regular expression for a text with places, white space in it being free."""
    made, seen = "", set()
    parts = PLACES.split(text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            made += r"\s*".join(re.escape(word) for word in re.split(r"\s+", part))
            continue
        made += f"(?P={part})" if part in seen else _GROUPS[part]
        seen.add(part)
        if not "".join(parts[number + 1 :]).strip():  # else more letters of a name might come
            made += r"(?=[^\w.:/-])"
    return made


@cache
def _parameter_patterns(form: CallForm) -> tuple[tuple[re.Pattern[str], ...], str, re.Pattern[str] | None]:
    """Beginnings of parameters, the text behind a value, and what is behind all of them."""
    heads = []
    for one in dict.fromkeys((form.parameter, form.other_parameter or form.parameter)):
        before = one.partition("$value")[0]
        space = before[len(before.rstrip()) :]
        pattern = pattern_of(before.rstrip())
        if space:  # as it is, or nothing: more of it belongs to the value
            pattern += f"(?:{re.escape(space)}|(?!{re.escape(space)})(?=.))"
        heads.append(re.compile(r"\s*" + pattern_of(form.separator) + pattern, re.DOTALL))
    behind = form.call.partition("$arguments")[2].strip()
    end = re.compile(r"\s*" + pattern_of(behind)) if behind else None
    return tuple(heads), form.parameter.partition("$value")[2], end
