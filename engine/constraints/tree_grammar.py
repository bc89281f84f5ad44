"""Rules for values inside of values, in families that write no JSON there, and for members in the schema's order."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from engine.constraints.grammars import OPTIONS
from engine.errors import InvalidRequestError
from engine.text.answers.call_form import PLACES, Tree

_TYPES = ("string", "number", "boolean", "object", "array", "null")
_NOTES = {"type", "description", "title", "default", "examples", "deprecated", "$comment", "$defs", "definitions"}
_DEEPEST = 8  # schemas inside of schemas; deeper values, and those that contain themselves, are any value


class Texts(Protocol):
    """What a writer of rules asks of the grammar that they belong to."""

    def exact(self, text: str) -> str:
        """The text itself."""
        ...

    def raw(self, rule: str, key: str, schema: Mapping[str, Any], after: str, lenient: bool) -> str:
        """A string without quotes around it, and what is behind it."""
        ...

    def add(self, rule: str, text: str) -> str:
        """Adds a rule; returns its name."""
        ...


class TreeWriter:
    """Writes the rules of one parameter.

    Args:
        tree: how the family writes values.
        texts: the grammar.
        lenient: whether what cannot be enforced is left out, not refused.
    """

    def __init__(self, tree: Tree, texts: Texts, lenient: bool) -> None:
        self._tree = tree
        self._texts = texts
        self._lenient = lenient

    def member(self, rule: str, pattern: str, key: str, schema: Mapping[str, Any], depth: int = 0) -> str:
        """A member of an object, or a parameter, by its pattern.

        Args:
            rule: a name for rules that only this member uses.
            pattern: the text around its key and value.
            key: its name.
            schema: of its value.
            depth: of the objects and arrays around it.

        Raises:
            InvalidRequestError: the schema has something that this notation cannot be held to.
        """
        before, after = (PLACES.sub(lambda place: key, part) for part in pattern.split("$value"))
        return f"{self._texts.exact(before)} {self._value(rule, key, schema, after, depth)}"

    def _value(self, rule: str, key: str, schema: Mapping[str, Any], after: str, depth: int) -> str:
        """A value and what is behind it."""
        definitions = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
        schema = {**_resolved(schema), **definitions}
        kind, exact = schema.get("type"), self._texts.exact
        options = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if options is not None:
            return "(" + " | ".join(self._constant(option) for option in options) + f") {exact(after)}"
        several = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(kind, list):
            several = [{**schema, "type": one} for one in kind]
        if several is not None and depth < _DEEPEST:
            ways = (
                self._value(f"{rule}_o{place}", key, {**one, **definitions}, after, depth + 1)
                for place, one in enumerate(several)
            )
            return "(" + " | ".join(ways) + ")"
        if kind == "string":
            before, behind = self._tree.string
            return f"{exact(before)} {self._texts.raw(f'{rule}_s', key, schema, behind + after, self._lenient)}"
        if kind in ("integer", "number", "boolean", "null"):
            return f"{json_value(schema)} {exact(after)}"
        if kind == "array" and depth < _DEEPEST:
            self._check(key, schema, {"items", "minItems", "maxItems"})
            return self._array(rule, key, schema, definitions, after, depth)
        if kind == "object" and "properties" in schema and depth < _DEEPEST:
            self._check(key, schema, {"properties", "required", "additionalProperties"})
            return self._object(rule, schema, definitions, after, depth)
        self._check(key, schema, {"properties", "required", "additionalProperties", "items", "anyOf", "oneOf"})
        return self._any(rule, key, after)

    def _array(
        self, rule: str, key: str, schema: Mapping[str, Any], definitions: dict[str, Any], after: str, depth: int
    ) -> str:
        tree, exact = self._tree, self._texts.exact
        items = {**schema.get("items", {}), **definitions}
        item = self._texts.add(f"{rule}_i", self.member(f"{rule}_j", tree.item, key, items, depth + 1))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        more = f"({exact(tree.separator)} {item}){{{max(least - 1, 0)},{'' if most is None else max(most - 1, 0)}}}"
        filled = "" if most == 0 else f"({item} {more}){'' if least else '?'}"
        return f"{exact(tree.brackets[0])} {filled} {exact(tree.brackets[1] + after)}"

    def _object(self, rule: str, schema: Mapping[str, Any], definitions: dict[str, Any], after: str, depth: int) -> str:
        tree, exact = self._tree, self._texts.exact
        written = {}
        for place, (key, inner) in enumerate(schema["properties"].items()):
            inner = {**(inner if isinstance(inner, Mapping) else {}), **definitions}
            name = f"{rule}_m{place}"
            written[key] = self._texts.add(name, self.member(f"{name}_v", tree.member, key, inner, depth + 1))
        for line in chain(f"{rule}_c", written, schema.get("required", ()), exact(tree.separator)):
            name, _, text = line.partition(": ")
            self._texts.add(name, text)
        return f"{exact(tree.braces[0])} {rule}_c {exact(tree.braces[1] + after)}"

    def _any(self, rule: str, key: str, after: str) -> str:
        """Any value. Where strings have no signs around them, a text."""
        if not self._tree.string[0]:
            return self._texts.raw(f"{rule}_s", key, {}, after, self._lenient)
        self._texts.add("any_value", 'any_string | %json {"type": ["number", "boolean", "null"]} | any_list | any_map')
        self._texts.add("any_string", self._value("any_text", key, {"type": "string"}, "", 0))
        self._texts.add("any_list", '"[" (any_value ("," any_value)*)? "]"')
        self._texts.add("any_map", '"{" (any_member ("," any_member)*)? "}"')
        self._texts.add("any_member", '/[A-Za-z_][A-Za-z0-9_]*/ ":" any_value')
        return f"any_value {self._texts.exact(after)}"

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return self._texts.exact(value.join(self._tree.string))
        if isinstance(value, (dict, list)):
            raise InvalidRequestError("an enum has an object or an array, which this model's calls cannot be held to")
        return quoted(json.dumps(value))

    def _check(self, key: str, schema: Mapping[str, Any], known: Collection[str]) -> None:
        unknown = set(schema) - _NOTES - set(known)
        if unknown and not self._lenient:
            raise InvalidRequestError(
                f"the parameter {key!r} has {', '.join(sorted(unknown))}, which calls of this model's notation cannot "
                'be held to; leave it out, or give the function "strict": false'
            )


def _resolved(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that a reference into the definitions beside it names; any value where there is none."""
    found: Any = schema
    for _ in range(_DEEPEST):
        if not isinstance(found, Mapping) or "$ref" not in found:
            break
        _, group, name, *_ = *str(found["$ref"]).split("/"), "", ""
        found = schema.get(group, {}).get(name, {})
    return dict(found) if isinstance(found, Mapping) and "$ref" not in found else {}


def chain(rule: str, members: Mapping[str, str], required: Collection[str], separator: str) -> list[str]:
    """Rules of members in their order, of which those that are not required may be left out.

    Two chains: what may follow nothing, and what may follow a member.

    Args:
        rule: the name of the whole.
        members: names of their rules by key.
        required: keys that cannot be left out.
        separator: what is between two members.
    """
    lines = []
    for place, (key, member) in enumerate(members.items()):
        skip_first, skip = "", ""
        if key not in required:
            skip_first, skip = f" | {rule}_a{place + 1}", f" | {rule}_b{place + 1}"
        lines.append(f"{rule}_a{place}: {member} {rule}_b{place + 1}{skip_first}")
        lines.append(f"{rule}_b{place}: {separator} {member} {rule}_b{place + 1}{skip}")
    n = len(members)
    return [*lines, f'{rule}_a{n}: ""', f'{rule}_b{n}: ""', f"{rule}: {rule}_a0"]


def json_types(schema: Mapping[str, Any]) -> list[str]:
    """The JSON types that a schema allows; integers are numbers."""
    given = schema.get("type", list(_TYPES))
    named = given if isinstance(given, list) else [given]
    return ["number" if kind == "integer" else str(kind) for kind in named]


def json_value(schema: Mapping[str, Any]) -> str:
    """A value in JSON."""
    options = {**OPTIONS, **schema.get("x-guidance", {})}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def quoted(text: str) -> str:
    """A string literal of the Lark variant, which is written as in JSON."""
    return json.dumps(text, ensure_ascii=False)
