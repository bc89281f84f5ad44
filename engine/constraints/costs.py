"""What is refused before the library compiles it, for compiling it may take minutes and gigabytes.

The library's own limits count what a grammar has been made into. They do not end the making: the time for regular
expressions and for the parts of a rule grows with the square of their length. `(a|b)*` eight thousand times takes 2 s
and 300 MB before it is refused, and other requests with new grammars wait meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import ConstraintError
from engine.sampling.constraint import Constraint, Gbnf, JsonSchema, Lark, Regex

MAX_CHARACTERS = 50_000
"""Of a regular expression, of a grammar, and of all patterns of a schema, or of the tools of a request, together."""


def check_cost(constraint: Constraint) -> None:
    """Refuse a description that may take too long.

    Raises:
        ConstraintError: it is too long.
    """
    match constraint:
        case Regex():
            _check(len(constraint.pattern), "the regular expression has")
        case Lark() | Gbnf():
            _check(len(constraint.grammar), "the grammar has")
        case JsonSchema():
            check_patterns([constraint.text])


def check_patterns(schemas: Iterable[str]) -> None:
    """Refuse JSON schemas whose regular expressions may together take too long.

    Raises:
        ConstraintError: they are too long.
    """
    texts = (text for text in schemas if '"pattern' in text)  # seldom
    _check(sum(_characters(json.loads(text)) for text in texts), "the patterns of the JSON schema have")


def _check(n: int, what: str) -> None:
    if n > MAX_CHARACTERS:
        raise ConstraintError(f"{what} {n} characters; allowed: at most {MAX_CHARACTERS}")


def _characters(schema: Any) -> int:
    """Characters of all patterns in a schema; also of what only looks like one, as the name of a property."""
    total, left = 0, [schema]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            pattern, named = one.get("pattern"), one.get("patternProperties")
            total += len(pattern) if isinstance(pattern, str) else 0
            total += sum(map(len, named)) if isinstance(named, Mapping) else 0
            left += one.values()
        elif isinstance(one, list):
            left += one
    return total
