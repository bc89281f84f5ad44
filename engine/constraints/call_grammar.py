"""The grammar of calls in a family's form, in llguidance's variant of Lark. Arguments fit the schemas of the tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.constraints.tree_grammar import TreeWriter, chain, json_types, json_value, quoted
from engine.errors import InvalidRequestError
from engine.text.answers.call_form import PLACES, CallForm
from engine.text.answers.nested_values import nullable_string
from engine.text.answers.rules import CallRules

Split = Callable[[str], list[str | int]]
"""Cuts a text at the names of control tokens."""

_META = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/\"]")
_RAW_KEYS = {"type", "description", "title", "default", "examples", "deprecated", "$comment", "enum", "const"}
_LENGTHS = {"minLength", "maxLength", "pattern"}


def call_grammar(rules: CallRules, split: Split, *, opened: bool, recipient: str | None = None) -> str:
    """The text of a grammar.

    Args:
        rules: the calls.
        split: cuts at control tokens, which are named by id.
        opened: begin behind the marker that opens calls.
        recipient: begin behind the header that names this function, with its arguments.

    Raises:
        InvalidRequestError: a schema that the form has no text for.
    """
    return _Writer(rules, split).text(opened, recipient)


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, rules: CallRules, split: Split) -> None:
        self._rules = rules
        self._form = rules.form
        self._split = split
        self._lines: list[str] = []

    def text(self, opened: bool, recipient: str | None) -> str:
        form, names = self._form, [name for name, _ in self._rules.tools]
        for number, (name, schema) in enumerate(self._rules.tools):
            self._call(number, name, json.loads(schema))
        if recipient is not None:
            start = f"body_{names.index(recipient)}"
        else:
            self._lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(names))))
            start = self._start(form, opened)
        return "\n".join([f"start: {start}", *dict.fromkeys(self._lines), "WS: /[ \\t\\r\\n]{1,20}/"])

    def _start(self, form: CallForm, opened: bool) -> str:
        several = self._rules.several and form.several
        begin, end = self.exact(form.begin), self.exact(form.end)
        first, last = (self._literal(part) for part in form.around)
        if form.between is not None:
            more = f"({self._literal(form.between)} call)*" if several else ""
            section = f"{first} call {more} {last} {end}"
            return section if opened else f"{self._before()} {begin} {section}"
        section = f"{first} call {last} {end}"
        if not several or (opened and form.end):  # the next section is seen when it begins
            return section if opened else f"{self._before()} {begin} {section}"
        again = f"(WS? {begin} {section})*"
        return f"{section} {again}" if opened else f"{self._before()} {begin} {section} {again}"

    def _before(self) -> str:
        """What may come before the first marker of a forced call."""
        if not self._form.opens:
            return f"WS? ({self.exact(self._form.lead)})?" if self._form.lead else "WS?"
        begin, end = self._form.thought
        if not begin:
            return ""
        self._lines.append(f"thought: {self.exact(begin)} {self._until('thought_text', '(?s:.*)', end)}")
        return "thought?"

    def _call(self, number: int, name: str, schema: dict[str, Any]) -> None:
        places = {
            "name": self.exact(name),
            "arguments": f"args_{number}",
            "id": "/[a-zA-Z0-9]{9}/",
            "index": "/[0-9]{1,2}/",
        }
        self._lines.append(f"call_{number}: {self._filled(self._form.call, places)}")
        if self._form.body:
            behind = self._form.call.partition(self._form.body)[2]
            self._lines.append(f"body_{number}: {self._filled(behind, places)}")
        if self._form.parameter:
            self._parameters(f"args_{number}", name, schema)
        else:
            self._lines.append(f"args_{number}: {json_value(schema)}")

    # Arguments that are written one by one ---------------------------------------------------------------------------

    def _parameters(self, rule: str, name: str, schema: dict[str, Any]) -> None:
        """One rule for each parameter, and two chains of rules: what may follow nothing, and what may follow one."""
        form = self._form
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping) or schema.get("type") != "object" or _combines(schema):
            raise InvalidRequestError(
                f"the parameters of the tool {name!r} are no plain object, which calls of the form {form.name} "
                'cannot be held to; give an object with "properties"'
            )
        lenient = schema.get("x-guidance", {}).get("lenient", False)
        definitions = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
        members = {
            key: {**(inner if isinstance(inner, Mapping) else {}), **definitions} for key, inner in properties.items()
        }
        written = {}
        for place, (key, inner) in enumerate(members.items()):
            written[key] = f"{rule}_p{place}"
            self._lines.append(f"{rule}_p{place}: {self._parameter(rule, place, key, inner, lenient)}")
        self._lines += chain(rule, written, schema.get("required", ()), self.exact(form.separator))

    def _parameter(self, rule: str, place: int, key: str, schema: dict[str, Any], lenient: bool) -> str:
        form = self._form
        if form.tree is not None:
            return TreeWriter(form.tree, self, lenient).member(f"{rule}_t{place}", form.parameter, key, schema)
        inner = nullable_string(schema)
        if inner is not None and not form.quoted:
            ways = (self._parameter(rule, place, key, one, lenient) for one in (inner, {"type": "null"}))
            return "(" + " | ".join(ways) + ")"
        raw = schema.get("type") == "string" and not form.quoted
        pattern = form.other_parameter if form.other_parameter and not raw else form.parameter
        places = {"key": self.exact(key), "type": "(" + " | ".join(map(quoted, json_types(schema))) + ")"}
        if not raw:
            value = json_value({**schema, "x-guidance": {"lenient": lenient}})
            return self._filled(pattern, {**places, "value": value})
        before, after = pattern.split("$value")
        return f"{self._filled(before, places)} {self.raw(f'{rule}_v{place}', key, schema, after, lenient)}"

    def raw(self, rule: str, key: str, schema: Mapping[str, Any], after: str, lenient: bool) -> str:
        """A string without quotes around it, and what is behind it."""
        options = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if options is not None:
            return "(" + " | ".join(quoted(str(option)) for option in options) + ") " + self.exact(after)
        return self._until(rule, _raw_text(schema, key, lenient), after)

    def _until(self, rule: str, pattern: str, end: str) -> str:
        """Text of a pattern without quotes around it, and the end behind it.

        Where the end is text, its first occurrence ends the text; where it begins with a control token, no text can be
        taken for it.
        """
        parts = self._split(end)
        head = parts[0] if isinstance(parts[0], str) else ""
        is_text = all(isinstance(part, str) for part in parts)
        self._lines.append(f"{rule}{'[lazy]' if is_text else ''}: /{pattern}{_escaped(head)}/")
        return f"{rule} {self._tokens(parts[1:] if head else parts)}"

    def add(self, rule: str, text: str) -> str:
        """Adds a rule; returns its name."""
        self._lines.append(f"{rule}: {text}")
        return rule

    # Literals --------------------------------------------------------------------------------------------------------

    def _filled(self, pattern: str, places: Mapping[str, str]) -> str:
        parts = PLACES.split(pattern)
        return " ".join(places[part] if number % 2 else self._literal(part) for number, part in enumerate(parts))

    def _literal(self, text: str) -> str:
        """Text of the form, with free white space where it is JSON."""
        if not self._form.loose:
            return self.exact(text)
        parts = re.split(r"\s+", text)
        return " WS? ".join(self.exact(part) for part in parts)

    def exact(self, text: str) -> str:
        """The text itself."""
        return self._tokens(self._split(text))

    def _tokens(self, parts: list[str | int]) -> str:
        return " ".join(f"<[{part}]>" if isinstance(part, int) else quoted(part) for part in parts if part != "")


def _combines(schema: Mapping[str, Any]) -> bool:
    return any(word in schema for word in ("anyOf", "oneOf", "allOf", "$ref", "if", "patternProperties"))


def _raw_text(schema: Mapping[str, Any], key: str, lenient: bool) -> str:
    """A regular expression for a string that is written without quotes."""
    unknown = set(schema) - _RAW_KEYS - _LENGTHS - {"$defs", "definitions"}
    if unknown and not lenient:
        raise InvalidRequestError(
            f"the parameter {key!r} has {', '.join(sorted(unknown))}, which strings that are written without quotes "
            'cannot be held to; leave it out, or give the function "strict": false'
        )
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and not lenient:
        if "minLength" in schema or "maxLength" in schema:
            raise InvalidRequestError(f"the parameter {key!r} has both a pattern and a length; give one of them")
        begin = "" if pattern.startswith("^") else "(?s:.*)"
        end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
        core = pattern.removeprefix("^").removesuffix("$" if not end else "")
        return f"{begin}(?:{core.replace('/', chr(92) + '/')}){end}"
    least, most = schema.get("minLength"), schema.get("maxLength")
    if least is None and most is None:
        return "(?s:.*)"
    return f"(?s:.{{{least or 0},{'' if most is None else most}}})"


def _escaped(text: str) -> str:
    return _META.sub(lambda found: "\\" + found[0], text).replace("\n", "\\n").replace("\t", "\\t")
