"""Reads calls of a known form while they are written, so that their arguments can be passed on token by token.

What was passed on is never revoked: a call begins here only behind the name of a function that may be called, in the
very form that constraints force. All other calls are read when they are whole, by tool_calls.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache

from engine.request import CallPart, ToolCall
from engine.text.answers.call_form import PLACES, CallForm, filled
from engine.text.answers.marker_search import possible_beginning
from engine.text.answers.tool_calls import Types, declared_type, new_id, value_of

_NAME = r"[\w.:/-]+"
_GROUPS = {
    "name": f"(?P<name>{_NAME})",
    "id": r"(?P<id>[\w.:-]+)",
    "index": r"(?P<index>\d+)",
    "key": r"""(?P<key>[^<>"|]+?)""",
    "type": r"(?P<type>\w+)",
}
_LONGEST_HEAD = 400  # characters; what is longer is not of the form
_SIGNS = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class Sections:
    """Gives a reader for each section of calls in an answer.

    Args:
        form: how the model writes calls.
        names: functions that may be called.
        types: types of their parameters.
    """

    def __init__(self, form: CallForm, names: Collection[str], types: Types) -> None:
        self._form = form
        self._names = frozenset(names)
        self._types = types

    def begin(self, marker: str | None, recipient: str | None, first: int) -> Section | None:
        """A reader for the section that begins; None where it is not in the form.

        Args:
            marker: that opened it; None where none did.
            recipient: the function that its header names.
            first: number of its first call in the answer.
        """
        form = self._form
        if not _streams(form) or (recipient is not None and recipient not in self._names):
            return None
        if recipient is None and (form.body or (marker or "") != form.begin):
            return None
        return Section(form, self._names, self._types, recipient, first)


def _streams(form: CallForm) -> bool:
    """Whether the text of a call can be passed on as it comes: its id is known by then, and its values end by text."""
    before, _, behind = form.call.partition("$arguments")
    if "$id" in behind or form.quoted or form.tree is not None or not ("$name" in before or form.body):
        return False
    return not form.parameter or bool(form.parameter.partition("$value")[2].strip())


class Section:
    """The calls of one section.

    Args:
        form: how they are written.
        names: functions that may be called.
        types: types of their parameters.
        recipient: the function that a header has named already.
        first: number of the first call.

    Attributes:
        calls: those that have begun; the last one may be cut off.
    """

    def __init__(
        self, form: CallForm, names: frozenset[str], types: Types, recipient: str | None, first: int
    ) -> None:
        self._form = form
        self._names = names
        self._types = types
        self._recipient = recipient
        self._first = first
        self._text = ""  # not read yet
        self._arguments: _Json | _Parameters | None = None  # of the call that is open
        self._lost = False  # the text is not of the form
        self.calls: list[ToolCall] = []

    @property
    def begun(self) -> bool:
        """Whether a call has begun."""
        return bool(self.calls)

    @property
    def in_value(self) -> bool:
        """Whether the text that comes next is inside a string, where a marker is text."""
        return self._arguments is not None and self._arguments.in_value

    def push(self, text: str) -> list[CallPart]:
        """The next text of the section; returns what it brings."""
        self._text += text
        parts: list[CallPart] = []
        while not self._lost:
            if self._arguments is None:
                if not self._next_call(parts):
                    break
            arguments = self._arguments
            assert arguments is not None, "a call is open"
            self._text, written = arguments.read(self._text)
            self._add(parts, written)
            if not arguments.done:
                break
            self._arguments = None
        return parts

    def finish(self, *, closed: bool) -> list[CallPart]:
        """Called at the end of the section.

        Args:
            closed: by its end marker; else the answer was cut off.
        """
        parts: list[CallPart] = []
        if self._arguments is not None and closed:
            self._add(parts, self._arguments.close())
        self._arguments = None
        return parts

    def _next_call(self, parts: list[CallPart]) -> bool:
        first, later = _heads(self._form, self._recipient is not None)
        found = (later if self.calls else first).match(self._text)
        if found is None:
            self._lost = len(self._text) > _LONGEST_HEAD
            return False
        groups = found.groupdict()
        name = groups.get("name") or self._recipient or ""
        if name not in self._names:
            self._lost = True
            return False
        id = groups.get("id") or new_id()
        if self._form.id:
            id = filled(self._form.id, name=name, index=groups.get("index") or "0")
        parts.append(CallPart(self._first + len(self.calls), "", id, name))
        self.calls.append(ToolCall(id, name, ""))
        self._text = self._text[found.end() :]
        if self._form.parameter:
            self._arguments = _Parameters(self._form, self._types.get(name, {}))
            self._add(parts, "{")
        else:
            self._arguments = _Json()
        return True

    def _add(self, parts: list[CallPart], text: str) -> None:
        if text:
            call = self.calls[-1]
            self.calls[-1] = ToolCall(call.id, call.name, call.arguments + text)
            parts.append(CallPart(self._first + len(self.calls) - 1, text))


class _Json:
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
        return ""


class _Parameters:
    """Arguments that are written one by one, made into a JSON object.

    Attributes:
        done: whether the text behind the last one has come.
        in_value: whether a value is open.
    """

    def __init__(self, form: CallForm, types: Types | dict[str, object]) -> None:
        self._types = types
        self._heads, self._behind, self._end = _parameter_patterns(form)
        self._core = self._behind.strip()
        self._n = 0
        self._kind: object = None
        self._is_string = False
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
            self._is_string, self.in_value = self._kind == "string", True
            begin = (", " if self._n else "") + json.dumps(key, ensure_ascii=False) + ": "
            self._n += 1
            return text[found.end() :], begin + ('"' if self._is_string else ""), True
        end = self._end.match(text) if self._end is not None else None
        if end is None:
            return text, "", False
        self.done = True
        return text[end.end() :], "}", False

    def _in_value(self, text: str) -> tuple[str, str, bool]:
        end = text.find(self._core)
        if end < 0:
            if not self._is_string:
                return text, "", False
            held = possible_beginning(text, (self._core, self._behind.rstrip()))
            ready, rest = text[: len(text) - held], text[len(text) - held :]
            return rest, _inside(ready), False
        value, rest = text[:end], text[end + len(self._core) :]
        space = self._behind[: len(self._behind) - len(self._behind.lstrip())]
        value = value.removesuffix(space)
        self.in_value = False
        if self._is_string:
            return rest, _inside(value) + '"', True
        return rest, json.dumps(value_of(value, self._kind), ensure_ascii=False), True


def _inside(text: str) -> str:
    """Text as it is inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@cache
def _heads(form: CallForm, named: bool) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What is before the arguments of the first call of a section and of the later ones.

    Args:
        form: of the calls.
        named: whether a header names the function of the first one.
    """
    before, _, behind = form.call.partition("$arguments")
    follows = "" if form.parameter else r"(?=\{)"
    first = _pattern(before.partition(form.body)[2] if named else before) + follows
    later = r"\s*".join((_pattern(behind), _pattern(form.between or ""), _pattern(before) + follows))
    never = r"(?!)"
    return (
        re.compile(r"\s*" + _pattern(form.around[0]) + first, re.DOTALL),
        re.compile(r"\s*" + later if form.between is not None and form.several else never, re.DOTALL),
    )


def _pattern(text: str) -> str:
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
        pattern = _pattern(before.rstrip())
        if space:  # as it is, or nothing: more of it belongs to the value
            pattern += f"(?:{re.escape(space)}|(?!{re.escape(space)})(?=.))"
        heads.append(re.compile(r"\s*" + _pattern(form.separator) + pattern, re.DOTALL))
    behind = form.call.partition("$arguments")[2].strip()
    end = re.compile(r"\s*" + _pattern(behind)) if behind else None
    return tuple(heads), form.parameter.partition("$value")[2], end
