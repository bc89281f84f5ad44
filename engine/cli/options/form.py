"""The options that say what a text has to be → a constraint, and what the command says where it was cut short."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.terminal import note, read_text
from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.request import GenerationResult
    from engine.sampling.constraint import Constraint

FORM = "Form of the text"
EXIT_CUT = 3
"""Exit status where a constrained text is not whole."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a text has to be; at most one of them."""

    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema",
            metavar="FILE|JSON",
            help="JSON that is valid under a schema: a file, or the schema itself.",
            rich_help_panel=FORM,
        ),
    ] = None
    grammar_file: Annotated[
        Path | None,
        typer.Option("--grammar-file", help="A text of a grammar: a .gbnf or .lark file.", rich_help_panel=FORM),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option("--regex", help="A text that a regular expression matches as a whole.", rich_help_panel=FORM),
    ] = None

    def constraint(self) -> Constraint | None:
        """The constraint; None where there is none.

        Raises:
            InvalidRequestError: several at once, or one that cannot be read.
        """
        from engine.sampling.constraint import Gbnf, JsonSchema, Lark, Regex

        given = [f"--{name.replace('_', '-')}" for name, value in asdict(self).items() if value is not None]
        if len(given) > 1:
            raise InvalidRequestError(f"{' and '.join(given)} are given; give one")
        if self.json_schema is not None:
            is_json = self.json_schema.strip() in ("true", "false") or self.json_schema.lstrip().startswith("{")
            return JsonSchema(self.json_schema if is_json else read_text(Path(self.json_schema)))
        if self.grammar_file is not None:
            suffix = self.grammar_file.suffix.lower()
            if suffix not in (".gbnf", ".lark"):
                raise InvalidRequestError(f"--grammar-file is {self.grammar_file}; its name ends with .gbnf or .lark")
            text = read_text(self.grammar_file)
            return Gbnf(text) if suffix == ".gbnf" else Lark(text)
        return Regex(self.regex) if self.regex is not None else None


def is_cut(results: Iterable[GenerationResult]) -> bool:
    """Whether a constrained text ended before it was whole; says so on stderr."""
    cut = next((one for one in results if one.finish_reason == "length"), None)
    if cut is not None:
        n = cut.stats.output_tokens
        note(f"the text was cut after {n} tokens and is not whole: give a larger --max-tokens, or a longer context")
    return cut is not None
