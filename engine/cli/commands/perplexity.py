"""gguf-engine perplexity: how well a model predicts a text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.options import shared
from engine.cli.options.groups import Without, with_groups
from engine.cli.options.opening import BATCHING_FIELDS, CHAT_FIELDS, Opening
from engine.cli.terminal import note, open_model, read_text, write, write_json
from engine.config import PAGE, page_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.api.perplexity import Perplexity


@with_groups
def perplexity(
    text_file: Annotated[Path | None, typer.Argument(help="A UTF-8 text; - is stdin.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="The text, as an option.", show_default=False)
    ] = None,
    model: shared.ModelOption = None,
    context: Annotated[
        int, typer.Option("--ctx-size", "--context", "-c", help="Tokens of one chunk; the second half of each counts.")
    ] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", help="Only the first chunks.", show_default="all")] = None,
    json: shared.JsonOption = False,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Chunks measured side by side, 1 to 256.")] = 1,
    *,
    opening: Annotated[
        Opening,
        Without("context_length", *BATCHING_FIELDS, *CHAT_FIELDS),
    ],
) -> None:
    """Measure perplexity as llama.cpp does, so that the figures can be compared."""
    source = text_file if text_file is not None else file
    if source is None or (text_file is not None and file is not None):
        raise typer.BadParameter("give one text file, as an argument or with --file")
    if chunks is not None and chunks < 1:
        raise typer.BadParameter(f"--chunks is {chunks}; at least 1 is needed")
    text = read_text(source)
    config = opening.config(
        model,
        context_length=context,
        max_sequences=batch,
        cache_tokens=batch * PAGE * page_count(context),
        prefill_chunk=max(512, context),
        prefix_cache=False,  # chunks have nothing in common, and all of each is scored
    )
    with open_model(config) as llm:
        from engine.api.perplexity import cut, measure

        pieces = cut(llm, text, context)[:chunks]
        begin = time.perf_counter()
        last = _follow(measure(llm, pieces), len(pieces))
        seconds = time.perf_counter() - begin
        if json:
            write_json(
                {
                    "perplexity": last.value,
                    "error": last.error,
                    "loss": last.loss,
                    "chunks": last.n_chunks,
                    "tokens": last.n_tokens,
                    "context": context,
                    "seconds": seconds,
                    "model": str(llm.config.model),
                    "device": llm.device,
                }
            )
        else:
            write(f"perplexity {last.value:.4f} +/- {last.error:.4f}\n")
            note(
                f"[{last.n_tokens} tokens of {last.n_chunks} chunks of {context} | {seconds:.1f} s, "
                f"{last.n_chunks * context / seconds:.0f} tok/s]"
            )


def _follow(running: Iterator[Perplexity], total: int) -> Perplexity:
    """The last value, with a progress bar that shows the running one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    last = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("perplexity", total=total)
        try:
            for last in running:
                progress.update(task, advance=1, description=f"perplexity {last.value:.4f}")
                if progress.disable and last.n_chunks % 10 == 0:
                    note(f"{last.n_chunks}/{total} chunks: {last.value:.4f}")
        except KeyboardInterrupt:
            if last is not None:
                note(f"interrupted after {last.n_chunks} of {total} chunks: {last.value:.4f} +/- {last.error:.4f}")
            raise
    assert last is not None, "cut() gives at least one chunk"
    return last
