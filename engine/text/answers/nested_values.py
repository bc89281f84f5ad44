"""Reads values that are written neither as JSON nor as Python: in braces with quotes of their own, or as elements.

Nothing here raises anything but ValueError.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

QUOTE = '<|"|>'
TAG = "]<]minimax[>["
NULLABLE = "string or null"
"""Kind of a value that is either; `null` is the second, every other text the first."""

_DEPTH = 64  # of values inside of values
_BARE = re.compile(r"[^,{}\[\]]*")
_KEY = re.compile(r'\s*([^:{}\[\],"]+?)\s*:|\s*"([^"]*)"\s*:')
_WORDS = {"None": None, "True": True, "False": False}
_ELEMENT = re.compile(rf"{re.escape(TAG)}<(/?)([^<>]+)>")


def read_braced(text: str, start: int) -> tuple[Any, int]:
    """A value such as {key:<|"|>text<|"|>,other:[1,true]} at a place of a text, and where it ends.

    Raises:
        ValueError: there is none.
    """
    return _Braced(text).value(start, 0)


class _Braced:
    def __init__(self, text: str) -> None:
        self._text = text

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        text = self._text
        at = self._skip(at)
        if depth > _DEPTH:
            raise ValueError("nested too deeply")
        if text.startswith(QUOTE, at):
            end = text.index(QUOTE, at + len(QUOTE))
            return text[at + len(QUOTE) : end], end + len(QUOTE)
        if text.startswith("{", at):
            return self._object(at + 1, depth)
        if text.startswith("[", at):
            return self._array(at + 1, depth)
        if text.startswith('"', at):
            return json.JSONDecoder(strict=False).raw_decode(text, at)
        found = _BARE.match(text, at)
        assert found is not None, "the pattern matches nothing too"
        word = found[0].strip()
        return (_WORDS[word] if word in _WORDS else json.loads(word)), found.end()

    def _object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        made: dict[str, Any] = {}
        at = self._skip(at)
        while not self._text.startswith("}", at):
            key = _KEY.match(self._text, at)
            if key is None:
                raise ValueError("a member has no key")
            made[(key[1] or key[2] or "").replace(QUOTE, "")], at = self.value(key.end(), depth + 1)
            at = self._next(at, "}")
        return made, at + 1

    def _array(self, at: int, depth: int) -> tuple[list[Any], int]:
        made = []
        at = self._skip(at)
        while not self._text.startswith("]", at):
            item, at = self.value(at, depth + 1)
            made.append(item)
            at = self._next(at, "]")
        return made, at + 1

    def _next(self, at: int, end: str) -> int:
        """Behind the comma at a place, or at the end sign."""
        at = self._skip(at)
        if self._text.startswith(",", at):
            return self._skip(at + 1)
        if not self._text.startswith(end, at):
            raise ValueError("neither a comma nor an end")
        return at

    def _skip(self, at: int) -> int:
        while at < len(self._text) and self._text[at].isspace():
            at += 1
        return at


def read_elements(text: str, schema: Any, depth: int = 0) -> Any:
    """A value of elements: one for each member of an object, elements named "item" for those of an array.

    Args:
        text: between the tags of its parameter.
        schema: its JSON schema, or its type alone; text that is to be a string stays one.
        depth: of the values around it.

    Raises:
        ValueError: the elements do not close one another.
    """
    schema = schema if isinstance(schema, Mapping) else {"type": schema}
    kind = NULLABLE if nullable_string(schema) is not None else schema.get("type")
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if kind in ("string", NULLABLE) or TAG not in text:
        return plain_value(text, kind)
    children = _children(text)
    if kind == "array" or (kind != "object" and {name for name, _ in children} == {"item"}):
        return [read_elements(inner, schema.get("items"), depth + 1) for _, inner in children]
    known = schema.get("properties")
    known = known if isinstance(known, Mapping) else {}
    return {name: read_elements(inner, known.get(name), depth + 1) for name, inner in children}


def _children(text: str) -> list[tuple[str, str]]:
    """Names and contents of the outermost elements."""
    children, level, begun, name = [], 0, 0, ""
    for tag in _ELEMENT.finditer(text):
        if not tag[1]:
            if level == 0:
                name, begun = tag[2], tag.end()
            level += 1
            continue
        level -= 1
        if level < 0:
            raise ValueError("an element ends that has not begun")
        if level == 0:
            children.append((name, text[begun : tag.start()]))
    if level:
        raise ValueError("an element does not end")
    return children


def kind_of(schema: Mapping[str, Any]) -> Any:
    """What has to be known of a schema to read a value that is written without quotes: its type, or the schema."""
    if schema.get("type") in ("object", "array"):
        return schema
    return NULLABLE if nullable_string(schema) is not None else schema.get("type")


def nullable_string(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of the string, where a schema allows a string or null and nothing else."""
    if schema.get("type") == ["string", "null"]:
        return {**schema, "type": "string"}
    ways = schema.get("anyOf", schema.get("oneOf"))
    if not isinstance(ways, list) or len(ways) != 2 or not all(isinstance(way, Mapping) for way in ways):
        return None
    kinds = [way.get("type") for way in ways]
    return dict(ways[kinds.index("string")]) if sorted(map(str, kinds)) == ["null", "string"] else None


def plain_value(text: str, kind: Any) -> Any:
    """The value that a text without elements stands for, where a value of that kind is expected."""
    if kind == "string":
        return text
    if kind == NULLABLE:
        return None if text.strip() == "null" else text
    if not text.strip() and kind in ("array", "object"):
        return [] if kind == "array" else {}
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _WORDS.get(text.strip(), text)
