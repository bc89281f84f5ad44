"""A grammar with what may come before the constrained text, as one grammar.

Thoughts are free text, but no control token: neither one of structure nor an end token, so that an answer never ends in
a thought. A token may hold the end of a marker and the beginning of the answer; the library reads bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from engine.sampling.opening import Opening
from engine.text import Tokenizer

ANSWER, CALLS = "answer", "calls"
"""Names of the constrained text's own grammar, and of that of the calls that may take its place."""

Spelled = list[tuple[bool, str]]
"""A marker in parts: whether each is a control token, and how Lark writes it."""


def with_opening(grammar: str, opening: Opening, tokenizer: Tokenizer, calls: str | None = None) -> str:
    """The grammar of a whole answer.

    Args:
        grammar: of the constrained text: one of llguidance's own JSON form, or of its Lark variant.
        opening: what may come before it.
        tokenizer: knows which markers are control tokens.
        calls: of calls of tools, which may come instead of the text, in the Lark variant.
    """
    parts: list[dict[str, object]] = [_own_form(grammar)]
    if calls is not None:
        parts.append({"name": CALLS, "lark_grammar": calls})
    lark = _Writer(tokenizer).grammar(opening, [str(part["name"]) for part in parts])
    return json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}, ensure_ascii=False)


def _own_form(grammar: str) -> dict[str, object]:
    if grammar.startswith("{"):
        (only,) = json.loads(grammar)["grammars"]
        return {**only, "name": ANSWER}
    return {"name": ANSWER, "lark_grammar": grammar}


class _Writer:
    """Writes the rules before the answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules = [r"TEXT: /(.|\n)+/", r"SPACE: /[ \n]{1,4}/"]

    def grammar(self, opening: Opening, answers: Sequence[str]) -> str:
        """The rules before an answer, which is of one of the grammars named."""
        answer = " | ".join(f"@{name}" for name in answers)
        self._rule("whole", [answer])
        thoughts = [f"{self._marker(one.begin)} {self._until(one.ends)}" for one in opening.thoughts]
        self._rule("thought", thoughts)
        self._rule("head", [self._marker(head) for head in opening.heads])
        many = "thought*" if thoughts else ""
        if opening.in_messages:
            before = [f"{self._until(opening.opened)} {many} head" if opening.opened else f"{many} head"]
        elif opening.opened:
            before = [self._until(opening.opened) + (" head?" if opening.heads else "")]
        else:
            before = [part for part in ("thought head?" if opening.heads else "thought",) if thoughts]
            before += ["head"] if opening.heads else []
        self._rule("before", before)
        starts = ["before SPACE? whole"] if before else []
        if not opening.in_messages and not opening.opened:
            starts.append("whole")
        self._rule("start", starts)
        return "\n".join(self._rules)

    def _rule(self, name: str, alternatives: list[str]) -> None:
        if alternatives:
            self._rules.append(f"{name}: {' | '.join(alternatives)}")

    def _marker(self, marker: str) -> str:
        return " ".join(part for _, part in self._spelled(marker))

    def _until(self, ends: tuple[str, ...]) -> str:
        """Any text up to one of several markers."""
        ways = []
        for end in ends:
            parts = self._spelled(end)
            if parts[0][0]:
                ways.append("TEXT? " + " ".join(part for _, part in parts))
                continue
            name = f"until_{len(self._rules)}"
            self._rules.append(rf"{name}[suffix={parts[0][1]}]: /(.|\n)*/")
            ways.append(" ".join([name, *(part for _, part in parts[1:])]))
        return f"({' | '.join(ways)})"

    def _spelled(self, marker: str) -> Spelled:
        tokenizer, parts, rest = self._tokenizer, [], marker
        for token_id in tokenizer.encode(marker, add_special=False, parse_special=True):
            name = tokenizer.token_text(token_id)
            if tokenizer.is_control(token_id) and name in rest:
                text, _, rest = rest.partition(name)
                parts += [(False, _literal(text))] if text else []
                parts.append((True, f"<[{token_id}]>"))
        return parts + ([(False, _literal(rest))] if rest else [])


_literal: Callable[[str], str] = json.JSONEncoder(ensure_ascii=False).encode
