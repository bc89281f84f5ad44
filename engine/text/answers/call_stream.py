"""Reads calls of a known form while they are written, so that their arguments can be passed on token by token.

What was passed on is never revoked: a call begins here only behind the name of a function that may be called, in the
very form that constraints force. All other calls are read when they are whole, by tool_calls.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

from engine.request import CallPart, ToolCall
from engine.text.answers.call_arguments import Arguments, arguments_of, pattern_of
from engine.text.answers.call_form import CallForm, filled
from engine.text.answers.tool_calls import Types, call_id

_LONGEST_HEAD = 400  # characters; what is longer is not of the form


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

    def begin(self, marker: str | None, recipient: str | None, first: int, key: str) -> Section | None:
        """A reader for the section that begins; None where it is not in the form.

        Args:
            marker: that opened it; None where none did.
            recipient: the function that its header names.
            first: number of its first call in the answer.
            key: makes ids of calls.
        """
        form = self._form
        if not _streams(form) or (recipient is not None and recipient not in self._names):
            return None
        if recipient is None and (form.body or (marker or "") != form.begin):
            return None
        return Section(form, self._names, self._types, recipient, first, key)


def _streams(form: CallForm) -> bool:
    """Whether the text of a call can be passed on as it comes: its id is known by then, and its values end by text."""
    before, _, behind = form.call.partition("$arguments")
    if "$id" in behind or not ("$name" in before or form.body):
        return False
    ends = form.quoted or form.tree is not None or form.parameter.partition("$value")[2].strip()
    return not form.parameter or bool(ends)


class Section:
    """The calls of one section.

    Args:
        form: how they are written.
        names: functions that may be called.
        types: types of their parameters.
        recipient: the function that a header has named already.
        first: number of the first call.
        key: makes ids of calls.
    """

    def __init__(
        self, form: CallForm, names: frozenset[str], types: Types, recipient: str | None, first: int, key: str
    ) -> None:
        self._form = form
        self._names = names
        self._types = types
        self._recipient = recipient
        self._first = first
        self._key = key
        self._text = ""  # not read yet
        self._arguments: Arguments | None = None  # of the call that is open
        self._lost = False  # the text is not of the form
        self._begun: list[tuple[str, str, list[str]]] = []  # id, name, pieces of the arguments

    @property
    def begun(self) -> bool:
        """Whether a call has begun."""
        return bool(self._begun)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that have begun; the last one may be cut off."""
        return tuple(ToolCall(id, name, "".join(pieces)) for id, name, pieces in self._begun)

    @property
    def in_value(self) -> bool:
        """Whether the text that comes next is inside a string, where a marker is text."""
        return self._arguments is not None and self._arguments.in_value

    def push(self, text: str) -> list[CallPart]:
        """The next text of the section; returns what it brings."""
        self._text += text
        parts: list[CallPart] = []
        while not self._lost:
            if self._arguments is None and not self._next_call(parts):
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
        found = (later if self._begun else first).match(self._text)
        if found is None:
            self._lost = len(self._text) > _LONGEST_HEAD
            return False
        groups = found.groupdict()
        name = groups.get("name") or self._recipient or ""
        if name not in self._names:
            self._lost = True
            return False
        index = self._first + len(self._begun)
        id = groups.get("id") or call_id(self._key, index)
        if self._form.id:
            id = filled(self._form.id, name=name, index=groups.get("index") or "0")
        parts.append(CallPart(index, "", id, name))
        self._begun.append((id, name, []))
        self._text = self._text[found.end() :]
        self._arguments = arguments_of(self._form, self._types.get(name, {}))
        if self._form.parameter:
            self._add(parts, "{")
        return True

    def _add(self, parts: list[CallPart], text: str) -> None:
        if text:
            self._begun[-1][2].append(text)
            parts.append(CallPart(self._first + len(self._begun) - 1, text))


@cache
def _heads(form: CallForm, named: bool) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What is before the arguments of the first call of a section and of the later ones.

    Args:
        form: of the calls.
        named: whether a header names the function of the first one.
    """
    before, _, behind = form.call.partition("$arguments")
    follows = "" if form.parameter else r"(?=\{)"
    behind = "" if form.parameter else behind  # there it has been read as the end of the arguments
    first = pattern_of(before.partition(form.body)[2] if named else before) + follows
    between = pattern_of(form.between or "")
    later = rf"{pattern_of(behind)}\s*(?:{between})?\s*{pattern_of(before)}{follows}"
    never = r"(?!)"
    return (
        re.compile(r"\s*" + pattern_of(form.around[0]) + first, re.DOTALL),
        re.compile(r"\s*" + later if form.several else never, re.DOTALL),
    )
