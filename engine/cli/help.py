"""The help of a command: its options by panel, none of whose names is cut however narrow the terminal is.

typer's own help puts names, short names, negations and types into columns of a table and cuts what does not fit there,
which at 80 columns are the names of a dozen options.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

_SHARE = 0.4
"""Of the width for the names, beside which the explanations are."""

_NARROW = 60
"""Columns below which explanations are under the names."""


class Command(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override] # click's own class
        """Write the help to stdout."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.panel import Panel

        console = Console(highlight=False, emoji=False, markup=False)
        console.print(Padding(self.get_usage(ctx), 1), style="bold")
        console.print(Padding(_one_line_each(self.help or ""), (0, 1, 1, 1)))
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for title, records in panels.items():
            body = _table(records, console.width - 4)
            console.print(Panel(body, title=title, title_align="left", border_style="dim"))


def _one_line_each(text: str) -> str:
    """Paragraphs of a docstring without the line breaks that the source has in them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _table(records: list[tuple[str, str]], width: int) -> Any:
    """Names and explanations: rich's table, or a column where the width is too small for two."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    names = [Text(name, style="bold cyan", overflow="fold") for name, _ in records]
    texts = [Text(" ".join(text.split()), overflow="fold") for _, text in records]
    if width < _NARROW:
        return Group(*(part for pair in zip(names, texts, strict=True) for part in (pair[0], Padding(pair[1], (0, 2)))))
    table = Table.grid(padding=(0, 2), expand=True)
    longest = max(name.cell_len for name in names)
    table.add_column(width=min(longest, int(_SHARE * width)), overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for name, text in zip(names, texts, strict=True):
        table.add_row(name, text)
    return table
