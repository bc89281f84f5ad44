"""Arguments written as elements inside of elements (MiniMax M3), as they come, made into JSON that only grows.

What an element holds goes by its schema, as nested_values.read_elements() has it for whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.text.answers.marker_search import inside, possible_beginning
from engine.text.answers.nested_values import NULLABLE, TAG, nullable_string, plain_value

_ELEMENT = re.compile(rf"{re.escape(TAG)}<(/?)([^<>]+)>")


@dataclass
class _Element:
    """One that is open.

    Attributes:
        name: its name. schema: of its value. kind: type of the value; NULLABLE; None where it is not known.
        holds: "text" that is a string, "object", "array"; "" as long as that is not known.
        waiting: text of which it is not known whether it is a string.
        count: members or items so far.
    """

    name: str
    schema: Mapping[str, Any]
    kind: Any
    holds: str = ""
    waiting: str = ""
    count: int = 0


class ElementArguments:
    """Reads the arguments of one call.

    Args:
        end: what ends them.
        types: types of the parameters, or their schemas.

    Attributes:
        done: whether they have ended.
    """

    def __init__(self, end: str, types: Mapping[str, Any]) -> None:
        self._end = end.strip()
        self._open = [_Element("", {"properties": types}, "object", "object")]
        self.done = False

    @property
    def in_value(self) -> bool:
        """Whether a value is open that may be text."""
        return self._open[-1].holds in ("", "text") if self._open else False

    def read(self, text: str) -> tuple[str, str]:
        """What is left of a text, and the JSON that it brings."""
        written = ""
        while text and not self.done:
            at = text.find(TAG)
            if at != 0:
                ready = at if at > 0 else len(text) - possible_beginning(text, (TAG,))
                written += self._text(text[:ready])
                text = text[ready:]
                if at < 0:
                    break
            if len(self._open) == 1 and text.startswith(self._end):
                self.done = True
                return text[len(self._end) :], written + "}"
            tag = _ELEMENT.match(text)
            if tag is None:
                if ">" in text[len(TAG) :]:  # no element: it is text
                    written += self._text(TAG)
                    text = text[len(TAG) :]
                    continue
                break
            written += self._tag(tag)
            text = text[tag.end() :]
        return text, written

    def close(self) -> str:
        """The end of the arguments, where their section ended before them."""
        missing = ""
        while not self.done and self._open:
            missing += self._closed(self._open.pop())
        self.done = True
        return missing

    def _text(self, text: str) -> str:
        """Text of the innermost element; between elements it has no meaning."""
        top = self._open[-1]
        if top.holds == "text":
            return inside(text)
        if top.holds or not text:
            return ""
        top.waiting += text
        if top.kind == NULLABLE and not "null".startswith(top.waiting.strip()):
            top.holds = "text"
            return '"' + inside(top.waiting)
        return ""

    def _tag(self, tag: re.Match[str]) -> str:
        top, name = self._open[-1], tag[2]
        if top.holds == "text" or (top.kind == NULLABLE and not top.holds):
            if tag[1] and name == top.name:
                return self._closed(self._open.pop())
            return self._text(tag[0])
        if tag[1]:
            return self._closed(self._open.pop()) if len(self._open) > 1 else ""
        before = ""
        if not top.holds:
            is_array = top.kind == "array" or (top.kind != "object" and name == "item")
            top.holds, before = ("array", "[") if is_array else ("object", "{")
        top.count += 1
        before += ", " if top.count > 1 else ""
        known: Any = top.schema.get("items")
        if top.holds == "object":
            before += json.dumps(name, ensure_ascii=False) + ": "
            members = top.schema.get("properties")
            known = members.get(name) if isinstance(members, Mapping) else None
        schema: Mapping[str, Any] = known if isinstance(known, Mapping) else {"type": known}
        kind = NULLABLE if known == NULLABLE or nullable_string(schema) is not None else schema.get("type")
        self._open.append(_Element(name, schema, kind, "text" if kind == "string" else ""))
        return before + ('"' if kind == "string" else "")

    @staticmethod
    def _closed(element: _Element) -> str:
        if element.holds:
            return {"text": '"', "array": "]", "object": "}"}[element.holds]
        return json.dumps(plain_value(element.waiting, element.kind), ensure_ascii=False)
