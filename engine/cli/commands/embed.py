"""gguf-engine embed: embeddings of texts, or documents in the order of how well they answer a query."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.interrupts import Interrupts
from engine.cli.options import shared
from engine.cli.options.groups import Without, with_groups
from engine.cli.options.opening import BATCHING_FIELDS, CHAT_FIELDS, Opening
from engine.cli.terminal import note, open_model, read_text, write, write_json
from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np

    from engine.api.llm import LLM

AT_ONCE = 256
"""Texts whose vectors are written together, so that a long input gives results from the beginning."""


@with_groups
def embed(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; - takes every line of stdin as one.", show_default=False)
    ] = None,
    model: shared.ModelOption = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="A whole UTF-8 file is one text; may be repeated.", show_default=False),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option("--pooling", help="mean, cls, last, none or rank.", show_default="what the file asks for"),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option("--dimensions", min=1, help="Numbers of a vector to keep (Matryoshka).", show_default="all"),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", help="Put before every text, or around {text}.", show_default=False),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option("--query", "-q", help="Rank the texts by how well they answer this.", show_default=False),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Divide every vector by its length.")
    ] = True,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are longer than the context, instead of stopping.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json/--plain", help="Lines of JSON, or one line of numbers for each vector.")
    ] = True,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="One line of statistics on stderr.")] = True,
    *,
    opening: Annotated[
        Opening,
        Without(*BATCHING_FIELDS, *CHAT_FIELDS),
    ],
) -> None:
    """Write an embedding of every text, one line each; with --query, the texts from the best answer to the worst."""
    given = _read(texts or [], files or [])
    settings: dict[str, Any] = {
        "pooling": pooling,
        "normalize": normalize,
        "dimensions": dimensions,
        "instruction": instruction,
        "truncate": truncate,
    }
    with open_model(opening.config(model)) as llm, Interrupts():
        begin = time.perf_counter()
        n_tokens = _embed(llm, given, settings, json=json) if query is None else _rank(llm, query, given, json=json)
        seconds = time.perf_counter() - begin
        if stats:
            note(
                f"[load {llm.load_seconds:.2f} s | {len(given)} texts, {n_tokens} tokens | {seconds:.2f} s, "
                f"{len(given) / seconds:.1f} texts/s, {n_tokens / seconds:.0f} tok/s]"
            )


def _read(texts: list[str], files: list[Path]) -> list[str]:
    found = [line for text in texts for line in (read_text(Path("-")).splitlines() if text == "-" else [text])]
    found += [read_text(path) for path in files]
    if not found:
        raise InvalidRequestError(
            'no text is given: gguf-engine embed -m MODEL "a text" "another", - for the lines of stdin, or --file FILE'
        )
    return found


def _embed(llm: LLM, texts: list[str], settings: dict[str, Any], *, json: bool) -> int:
    """Write the vectors; returns how many tokens the texts had."""
    n_tokens = 0
    for start in range(0, len(texts), AT_ONCE):
        request = llm.embeddings.request(texts[start : start + AT_ONCE], **settings)
        n_tokens += request.n_tokens
        for place, vector in enumerate(llm.embeddings.run(request)):
            if json:
                write_json({"index": start + place, "tokens": len(request.texts[place]), "embedding": vector.tolist()})
            else:
                write("".join(_line(row) for row in vector.reshape(-1, vector.shape[-1])))
    return n_tokens


def _rank(llm: LLM, query: str, texts: list[str], *, json: bool) -> int:
    """Write the ranking; returns how many tokens the pairs had."""
    request = llm.embeddings.ranking(query, texts)
    for one in request.ranked(llm.embeddings.run(request)):
        if json:
            write_json({"index": one.index, "score": one.score, "document": one.document})
        else:
            write(f"{one.score:.6g}\t{one.index}\t{one.document}\n")
    return request.n_tokens


def _line(row: np.ndarray) -> str:
    return " ".join(f"{value:.8g}" for value in row.tolist()) + "\n"
