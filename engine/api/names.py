"""What a caller names as a model → a file on this machine. The one place where names become paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def resolve_model(model: str | os.PathLike[str], status: Callable[[str], None] | None = None) -> Path:
    """The file that a model goes by: a path as it is, or `hf:owner/repo[:quant][@revision]`.

    A model of the Hugging Face hub is fetched where it is not in the cache.

    Args:
        model: path or name.
        status: called with one sentence about a download and how far it is; None shows a bar on stderr where that is a
            terminal.

    Raises:
        InvalidRequestError: a name of another form.
        DownloadError: the model cannot be fetched; says why and what to do.
    """
    from engine.hub.names import HubName, is_hub_name

    text = os.fspath(model)
    if not is_hub_name(text):
        return Path(model)
    from engine.hub.progress import progress_text, shown
    from engine.hub.resolve import resolve

    name = HubName.parse(text)
    if status is not None:
        return resolve(name, lambda what, done, total: status(progress_text(what, done, total)))
    with shown() as progress:
        return resolve(name, progress)
