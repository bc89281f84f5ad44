"""From the description of a constraint to the text of an llguidance grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher, grammar_from

from engine.errors import ConstraintError
from engine.sampling.constraint import Choice, Constraint, Gbnf, JsonObject, JsonSchema, Lark, Regex

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

OPTIONS: JsonCompileOptions = {"lenient": False, "whitespace_pattern": r" |\n[ \t]{0,20}"}
"""They win over options inside a schema. Nothing that the library cannot do is ignored. Between two parts of JSON is at
most one space, or one line break and an indentation: models may otherwise write spaces until max_tokens ends them."""

LONGEST_REASON = 300
"""Characters. The library quotes values of schemas as a whole."""

NAMES = {
    JsonSchema: "the JSON schema",
    JsonObject: "JSON",
    Regex: "the regular expression",
    Choice: "the choices",
    Lark: "the Lark grammar",
    Gbnf: "the GBNF grammar",
}


def grammar_text(constraint: Constraint) -> str:
    """The constraint in llguidance's own JSON form, or in its Lark variant.

    Raises:
        ConstraintError: one that cannot be read, or is nested too deeply.
    """
    try:
        return _written(constraint)
    except Exception as error:  # the converters raise whatever their parsers meet
        raise refused(constraint, str(error)) from None


def _written(constraint: Constraint) -> str:
    match constraint:
        case JsonSchema():
            return LLMatcher.grammar_from_json_schema(constraint.text, overrides=OPTIONS)
        case JsonObject():
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=OPTIONS)
        case Regex():
            return LLMatcher.grammar_from_regex(constraint.pattern)
        case Choice():
            # One terminal: thousands of rules would be more than a state of the library's parser may have.
            words = " | ".join(_quoted(option) for option in constraint.options)
            return LLMatcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
        case Lark():
            return LLMatcher.grammar_from_lark(constraint.grammar)
        case Gbnf():
            return grammar_from("gbnf", constraint.grammar)


def refused(constraint: Constraint, reason: str) -> ConstraintError:
    """The error for a constraint that cannot be used, with the library's reason in one short line."""
    return ConstraintError(f"{NAMES[type(constraint)]} cannot be used as a constraint: {short_reason(reason)}")


def short_reason(reason: str) -> str:
    """What the library says without the lines that it quotes from the grammar, and without its own call stack."""
    lines = [line.strip() for line in reason.strip().splitlines()] or [""]
    said = [lines[0], *(line for line in lines[1:] if line.startswith("error:"))]
    text = " ".join(said)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _quoted(text: str) -> str:
    """A string literal of the Lark variant, which is written as in JSON."""
    return json.dumps(text, ensure_ascii=False)
