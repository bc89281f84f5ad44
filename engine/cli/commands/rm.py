"""gguf-engine rm: take models out of the Hugging Face cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.terminal import note
from engine.units import size_text

if TYPE_CHECKING:
    from engine.hub.cache import LocalModel
    from engine.hub.names import HubName


def rm(
    name: Annotated[str, typer.Argument(help="hf:owner/repo[:quant][@revision], as `gguf-engine list` shows it.")],
    everything: Annotated[
        bool, typer.Option("--all", help="All models of the repository, and its unfinished downloads.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int:
    """Delete a model from the cache. Other programs that use the same cache lose it as well."""
    from engine.errors import InvalidRequestError
    from engine.hub.cache import remove, remove_unfinished, unfinished
    from engine.hub.names import HubName

    wanted = HubName.typed(name)
    partial = unfinished().get(wanted.repo, 0)
    chosen = _chosen(wanted, everything, bool(partial))
    if chosen and not everything:
        partial = 0
    for one in chosen:
        note(f"{one.name}  {size_text(one.model.size)}")
    if partial:
        note(f"unfinished downloads of {wanted.repo}  {size_text(partial)}")
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidRequestError("rm asks before it deletes, and stdin is no terminal: give --yes")
        print("delete? [y/N] ", end="", file=sys.stderr, flush=True)  # stdout is for results alone
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            note("nothing was deleted")
            return 1
    freed = sum(remove(one) for one in chosen)
    if partial:
        freed += remove_unfinished(wanted.repo)
    note(f"freed {size_text(freed)}")
    return 0


def _chosen(wanted: HubName, everything: bool, partial: bool) -> list[LocalModel]:
    """The models that a name means here; none where only unfinished downloads are left."""
    from engine.errors import DownloadError
    from engine.hub.cache import local_models
    from engine.hub.names import DEFAULT_REVISION, choose

    here = local_models(wanted.repo)
    models = [one.model for one in here]
    named = models if wanted.quant is None else choose(models, wanted.quant)
    chosen = [one for one in here if any(one.model is model for model in named)]
    if wanted.revision != DEFAULT_REVISION:
        chosen = [one for one in chosen if wanted.revision == one.commit]
    if not everything and len(chosen) > 1:  # of the same file in several commits the current one, if that is clear
        chosen = [one for one in chosen if one.name.revision == DEFAULT_REVISION] or chosen
    if len(chosen) == 1 or (chosen and everything) or (partial and not here):
        return chosen
    there = f"the cache has {', '.join(str(one.name) for one in here)}: " if here else "nothing of it is in the cache: "
    remedy = "name one of these, or --all" if here else "see `gguf-engine list`"
    raise DownloadError(f"{wanted}: found {len(chosen)} models of that name; {there}{remedy}")
