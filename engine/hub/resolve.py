"""From a name to a file: what is here is opened without asking; what is not is fetched."""

from __future__ import annotations

import logging
from pathlib import Path

from engine.errors import DownloadError
from engine.hub.cache import LocalModel, Repo, find, local_models
from engine.hub.client import Client, HubUnavailableError, endpoint, is_offline
from engine.hub.download import fetch
from engine.hub.names import DEFAULT_REVISION, HubName, models_of, the_one
from engine.hub.progress import Progress, ignore

log = logging.getLogger("engine")


def resolve(name: HubName, progress: Progress = ignore) -> Path:
    """The file of a model, fetched where it is not in the cache; the first one of a split model.

    A model that is here is not looked for elsewhere: pull() does that. Where the hub cannot be asked, an older commit
    of the branch main that is here is taken, with a warning.

    Raises:
        DownloadError: it is not here and cannot be fetched; says why and what to do.
    """
    if found := find(name):
        return found.path
    try:
        return _fetched(name, progress, check=False)
    except HubUnavailableError as error:
        older = find(name, any_commit=True) if name.revision == DEFAULT_REVISION else None
        if older is None:
            raise
        log.warning("%s; taking %s of commit %s, which is here", error, older.path.name, older.commit[:12])
        return older.path


def pull(name: HubName, progress: Progress = ignore) -> Path:
    """The file of a model as the hub has it now; what is here already is compared with the hub's checksum.

    Raises:
        DownloadError: it cannot be fetched; says why and what to do.
    """
    return _fetched(name, progress, check=True)


def _fetched(name: HubName, progress: Progress, *, check: bool) -> Path:
    if is_offline():
        raise HubUnavailableError(f"{name}: HF_HUB_OFFLINE forbids asking the hub, and {_what_is_here(name)}")
    client = Client(name)
    listing = client.listing()
    models = models_of(listing.files)
    if not models:
        others = sorted({Path(file.path).suffix for file in listing.files} - {""})
        found = f"{len(listing.files)} files ({', '.join(others[:8])})" if listing.files else "no file"
        raise DownloadError(
            f"{name}: no GGUF model in {endpoint()}/{name.repo}: found {found}; many models have a second repository "
            "with -GGUF in its name"
        )
    model = the_one(name, models, f"in {name.repo}")
    repo = Repo.of(name.repo)
    before = 0
    paths = []
    for file in model.files:

        def tell(text: str, done: int, before: int = before) -> None:
            progress(text, before + done, model.size)

        paths.append(fetch(client, repo, listing.commit, file, tell, check=check))
        before += file.size
    try:
        repo.note_commit(name.revision, listing.commit)
    except OSError as error:
        raise DownloadError(f"{repo.folder}: the cache cannot be written: {error.strerror or error}") from error
    return paths[0]


def _what_is_here(name: HubName) -> str:
    here: list[LocalModel] = local_models(name.repo)
    if not here:
        return f"nothing of {name.repo} is in the cache: unset it to download the model"
    return f"of {name.repo} the cache has {', '.join(str(one.name) for one in here)}: open one of these, or unset it"
