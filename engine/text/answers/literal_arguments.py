"""Arguments written as literals that are no JSON, while they are written: Python's, and those in braces of Gemma 4.

They are made into JSON text that only grows, as json.dumps would write it. What cannot be read is left alone: calls are
held to their form by constraints, so it is the end of an answer that was cut off.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from engine.text.answers.marker_search import inside, possible_beginning
from engine.text.answers.nested_values import QUOTE


@dataclass(frozen=True)
class Notation:
    """How a family writes literals.

    Attributes:
        joiner: what is between the name of an argument and its value; inside of objects it is a colon.
        end: what ends the arguments.
        quotes: what is before and behind a string, the longest first.
        raw: of these, those whose strings have no escapes.
        brackets: what opens objects and arrays, and what closes them.
        word: any other value.
    """

    joiner: str
    end: str
    quotes: tuple[str, ...]
    raw: tuple[str, ...]
    brackets: dict[str, str]
    word: re.Pattern[str]


PYTHON = Notation(
    "=", ")", ('"""', "'''", '"', "'"), (), {"{": "}", "[": "]", "(": ")"}, re.compile(r"[^\s,()\[\]{}:=\"']+")
)
BRACED = Notation(":", "}", (QUOTE, '"'), (QUOTE,), {"{": "}", "[": "]"}, re.compile(r"[^,{}\[\]\"<]+"))

_KEY = {sign: re.compile(rf"""([^,(){{}}\[\]"':=<]+?)\s*{sign}""") for sign in ":="}
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3}|[0-7]{1,2}(?=[^0-7]))|([^xuU0-7]))",
    re.DOTALL,
)
_LONGEST_ESCAPE = 10
_SIGNS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_AS_THEY_ARE = "\\'\"/"
_WORDS = {"True": True, "False": False, "None": None}


@dataclass
class _Open:
    """A container that is open: what closes it, what comes between key and value ("" in arrays), members so far."""

    close: str
    joiner: str
    count: int = 0

    @property
    def json_close(self) -> str:
        return "}" if self.joiner else "]"


class LiteralArguments:
    """Reads the arguments of one call, from behind the sign that opens them.

    Args:
        notation: how they are written.

    Attributes:
        done: whether they have ended.
    """

    def __init__(self, notation: Notation) -> None:
        self._notation = notation
        self._open = [_Open(notation.end, notation.joiner)]
        self._quote = ""  # of the string that is open
        self._opens = False  # one begins, with quotes that are not all there yet
        self._wants = "member"  # or, behind a key that was a string, "joiner"; or "value", or "comma" behind a value
        self.done = False

    @property
    def in_value(self) -> bool:
        """Whether a string is open, where a marker is text."""
        return bool(self._quote) or self._opens

    def read(self, text: str) -> tuple[str, str]:
        """What is left of a text, and the JSON that it brings."""
        written = ""
        while text and not self.done:
            found = self._in_string(text) if self._quote else self._sign(text)
            if found is None:
                break
            text, more = found
            written += more
        return text, written

    def close(self) -> str:
        """The end of the arguments, where their section ended before them."""
        if self.done:
            return ""
        missing = '"' if self._quote else "null" if self._wants == "value" else ""
        if self._wants == "joiner":
            missing += ": null"
        self.done = True
        return missing + "".join(one.json_close for one in reversed(self._open))

    # ---- outside of strings ----------------------------------------------------------------------------------

    def _sign(self, text: str) -> tuple[str, str] | None:
        """What is left behind the next sign, and what it brings; None where more is needed."""
        text = text.lstrip()
        if not text:
            return "", ""
        top = self._open[-1]
        if self._wants == "joiner":
            return (self._value_behind(text[1:]), ": ") if text[0] in ":=" else None
        if self._wants == "comma" and text[0] == ",":
            self._wants = "member"
            return text[1:], ""
        if self._wants != "value" and text.startswith(top.close):
            return self._closed(text[len(top.close) :])
        if self._wants == "comma":
            return None
        if self._wants == "member" and top.joiner:
            return self._key(text, top)
        return self._value(text, top)

    def _closed(self, text: str) -> tuple[str, str]:
        closed = self._open.pop()
        self.done, self._wants = not self._open, "comma"
        return text, closed.json_close

    def _value_behind(self, text: str) -> str:
        self._wants = "value"
        return text

    def _between(self, top: _Open) -> str:
        """What comes before the next member."""
        top.count += 1
        return ", " if top.count > 1 else ""

    def _key(self, text: str, top: _Open) -> tuple[str, str] | None:
        quote = self._opening(text)
        if quote is None:
            return None
        if quote:
            self._quote, self._wants = quote, "joiner"
            return text[len(quote) :], self._between(top) + '"'
        found = _KEY[top.joiner].match(text)
        if found is None:
            return None
        self._wants = "value"
        return text[found.end() :], f"{self._between(top)}{json.dumps(found[1].strip(), ensure_ascii=False)}: "

    def _value(self, text: str, top: _Open) -> tuple[str, str] | None:
        quote, close = self._opening(text), self._notation.brackets.get(text[0])
        found = self._notation.word.match(text)
        if quote:
            self._quote, self._wants = quote, "comma"
            rest, written = text[len(quote) :], '"'
        elif close is not None:
            self._open.append(_Open(close, ":" if text[0] == "{" else ""))
            self._wants = "member"
            rest, written = text[1:], "{" if text[0] == "{" else "["
        elif quote is None or found is None or found.end() == len(text):  # it may go on
            return None
        else:
            self._wants = "comma"
            rest, written = text[found.end() :], json.dumps(_meant(found[0].strip()), ensure_ascii=False)
        return rest, ("" if top.joiner else self._between(top)) + written

    def _opening(self, text: str) -> str | None:
        """What opens the string that a text begins with: "" where it is none, None where more is needed to tell."""
        self._opens = False
        for quote in self._notation.quotes:
            if text.startswith(quote):
                return quote
            if quote.startswith(text):
                self._opens = True
                return None
        return ""

    # ---- inside of strings -----------------------------------------------------------------------------------

    def _in_string(self, text: str) -> tuple[str, str] | None:
        quote = self._quote
        end = text.find(quote)
        at = -1 if quote in self._notation.raw else text.find("\\", 0, None if end < 0 else end)
        if at == 0:
            return self._escape(text)
        if at > 0 or end < 0:
            ready = at if at > 0 else len(text) - possible_beginning(text, (quote,))
            return (text[ready:], inside(text[:ready])) if ready else None
        self._quote = ""
        return text[end + len(quote) :], inside(text[:end]) + '"'

    @staticmethod
    def _escape(text: str) -> tuple[str, str] | None:
        """An escape sequence of Python or JSON, as JSON has it; one that neither knows is text."""
        found = _ESCAPE.match(text)
        if found is None:
            return None if len(text) < _LONGEST_ESCAPE else (text[1:], inside("\\"))
        rest, (byte, unit, point, octal, sign) = text[found.end() :], found.groups()
        if unit is not None:
            return rest, "\\u" + unit  # half a character perhaps, of which the other half follows
        if sign is None:
            number = int(octal, 8) if octal else int(byte or point, 16)
            return rest, inside(chr(number) if number < 0x110000 else "\ufffd")
        return rest, inside(sign if sign in _AS_THEY_ARE else _SIGNS.get(sign, "\\" + sign))


def _meant(word: str) -> Any:
    """The value that a word stands for; a text where it is none."""
    if word in _WORDS:
        return _WORDS[word]
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(word)
        json.dumps(value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return word
    return value
