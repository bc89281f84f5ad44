"""The list of commands. Each command's module imports what is heavy only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from engine import __version__
from engine.cli.commands.bench import bench
from engine.cli.commands.chat import chat
from engine.cli.commands.embed import embed
from engine.cli.commands.generate import generate
from engine.cli.commands.inspect import inspect
from engine.cli.commands.list_models import list_models
from engine.cli.commands.perplexity import perplexity
from engine.cli.commands.pull import pull
from engine.cli.commands.rm import rm
from engine.cli.commands.serve import serve
from engine.cli.help import Command

app = typer.Typer(
    help="Run GGUF language models: no compiler, no build, on the CPU or with the whole model on the GPU. "
    "Without --model a small bundled story-telling model is used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, embed, serve, inspect, bench, perplexity, pull, rm):
    app.command(cls=Command)(command)
app.command("list", cls=Command)(list_models)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gguf-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error; allowed anywhere.")
    ] = False,
) -> None:
    pass
