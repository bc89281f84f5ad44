"""gguf-engine list: the models in the Hugging Face cache, and which of them this machine can run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.options import shared
from engine.cli.options.groups import Only, with_groups
from engine.cli.options.opening import Opening
from engine.cli.terminal import note, write, write_json
from engine.units import size_text


@with_groups
def list_models(
    repo: Annotated[
        str | None, typer.Argument(help="Only the models of this repository, owner/repo.", show_default=False)
    ] = None,
    json: shared.JsonOption = False,
    *,
    opening: Annotated[Opening, Only("device", "context_length")],
) -> None:
    """List the models that were fetched: name, size, type, architecture, and whether they fit this machine."""
    from engine.hub.cache import cache_dir, local_models, unfinished
    from engine.hub.names import HubName

    opening.config(None)  # refuses bad settings also where there is no model
    wanted = HubName.typed(repo).repo if repo is not None else None
    rows = []
    for local in local_models(wanted):
        rows.append(
            {
                "name": str(local.name),
                "size": local.model.size,
                "type": local.model.label,
                **_contents(local.path, opening),
                "revision": local.commit,
                "path": str(local.path),
            }
        )
    partial = {name: size for name, size in unfinished().items() if wanted in (None, name)}
    if json:
        write_json({"cache": str(cache_dir()), "models": rows, "unfinished": partial})
        return
    if not rows:
        note(f"no model in {cache_dir()}: `gguf-engine pull hf:owner/repo` fetches one")
    _show(rows)
    for name, size in partial.items():
        note(f"{size_text(size)} of unfinished downloads of {name}: pull continues them, `gguf-engine rm` deletes them")


def _contents(path: Path, opening: Opening) -> dict[str, Any]:
    """What the file itself tells: architecture, and whether the model can run here."""
    from engine.errors import EngineError
    from engine.gguf import open_gguf
    from engine.runner.room import fit_of

    log = logging.getLogger("engine")
    level = log.level
    log.setLevel(logging.ERROR)  # a warning for every file would bury the list; inspect shows them
    try:
        with open_gguf(path) as file:
            fit = fit_of(file, opening.config(path, max_sequences=1))
            architecture = str(file.metadata.get("general.architecture", "?"))
    except EngineError as error:
        return {"architecture": "?", "fits": False, "fit": f"no: {error}"}
    finally:
        log.setLevel(level)
    if fit.error:
        text = f"no: {fit.error}"
    elif not fit.fits:
        text = f"no: takes {size_text(fit.needed_unpacked)} of {size_text(fit.available)} ({fit.device})"
    else:
        how = ", with --no-repack" if fit.needs_unpacked else ""
        needed = fit.needed_unpacked if fit.needs_unpacked else fit.needed
        text = f"yes: {size_text(needed)} of {size_text(fit.available)} ({fit.device}{how})"
    return {"architecture": architecture, "fits": fit.fits, "fit": text}


def _show(rows: list[dict[str, Any]]) -> None:
    heads = {"name": "name", "size": "size", "type": "type", "architecture": "architecture", "fit": "fits this machine"}
    table = [heads, *({**row, "size": size_text(row["size"])} for row in rows)] if rows else []
    widths = {key: max(len(row[key]) for row in table) for key in heads} if table else {}
    for row in table:
        cells = [
            row[key].rjust(widths[key]) if key == "size" else row[key].ljust(widths[key])
            for key in heads
            if key != "fit"
        ]
        write("  ".join([*cells, " ".join(row["fit"].split())]).rstrip() + "\n")
