"""Options that several commands share, under the names that users of llama.cpp and vLLM know.

Those that always go together are groups: Opening (opening.py) and Sampling (sampling.py), made by groups.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CHAT = "Conversation"

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="GGUF file (any part of a split one), or hf:owner/repo[:quant] of the Hugging Face hub.",
        show_default="the bundled model",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]

SystemOption = Annotated[
    str | None, typer.Option("--system", "-sys", help="A system message put first.", rich_help_panel=CHAT)
]
TemplateFileOption = Annotated[
    Path | None,
    typer.Option(
        "--chat-template-file", help="A jinja2 chat template instead of the model's own.", rich_help_panel=CHAT
    ),
]
ChatVarOption = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-var",
        metavar="NAME=VALUE",
        help="A variable of the chat template, as enable_thinking=false; VALUE is JSON or text. "
        "May be given several times.",
        rich_help_panel=CHAT,
    ),
]
