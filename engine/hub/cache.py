"""The Hugging Face cache of this machine: where files are, which models are there, and how they are removed.

The layout is the one that all Hugging Face tools share (huggingface.co/docs/huggingface_hub/guides/manage-cache):

    CACHE/models--OWNER--REPO/refs/REVISION            text: the commit that a branch or tag was at
                              snapshots/COMMIT/PATH     a link to the blob
                              blobs/ETAG                the content; ETAG is its SHA-256, or git's hash of a small file
                              blobs/ETAG.incomplete     as much of it as has come
    CACHE/.locks/models--OWNER--REPO/ETAG.lock          held by the process that writes the blob

Knows neither network nor huggingface_hub, so that a model that is here opens without either.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.hub.names import DEFAULT_QUANT, HubName, RepoFile, RepoModel, choose, models_of

COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)")


def cache_dir() -> Path:
    """The folder, by the variables that all Hugging Face tools read."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(name):
            return _expanded(folder)
    if home := os.environ.get("HF_HOME"):
        return _expanded(home) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(folder: str) -> Path:
    return Path(os.path.expandvars(folder)).expanduser()


@dataclass(frozen=True)
class Repo:
    """The place of one repository in the cache; it need not exist.

    Attributes:
        name: OWNER/REPO.
        folder: its folder.
    """

    name: str
    folder: Path

    @classmethod
    def of(cls, name: str) -> Repo:
        """The place of a repository in the cache in force."""
        return cls(name, cache_dir() / f"models--{name.replace('/', '--')}")

    def blob(self, etag: str) -> Path:
        """Where a content is kept."""
        return self.folder / "blobs" / etag

    def lock(self, etag: str) -> Path:
        """The file to lock while a content is written."""
        return self.folder.parent / ".locks" / self.folder.name / f"{etag}.lock"

    def snapshot(self, commit: str) -> Path:
        """The folder with the files of a commit."""
        return self.folder / "snapshots" / commit

    def commit(self, revision: str) -> str | None:
        """The commit that a revision was at when it was last asked for; None where it never was."""
        if COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def note_commit(self, revision: str, commit: str) -> None:
        """Keep which commit a branch or tag is at; one replacement of the file, so it is never half written."""
        ref = self.folder / "refs" / revision
        if revision == commit or self.commit(revision) == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{os.getpid()}.{threading.get_ident()}.new")  # two threads may fetch at once
        new.write_text(commit, encoding="ascii")
        new.replace(ref)

    def commits(self) -> list[str]:
        """Commits of which files are here, the one that was added to last first."""
        folders = _folders(self.folder / "snapshots")
        return [folder.name for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)]

    def models(self, commit: str) -> list[RepoModel]:
        """The models of a commit of which at least a part is here."""
        return models_of(self._files(self.snapshot(commit)))

    def _files(self, snapshot: Path) -> Iterator[RepoFile]:
        for folder, _, names in os.walk(snapshot):
            for name in names:
                path = Path(folder) / name
                with suppress(OSError):  # a link whose blob is gone
                    yield RepoFile(path.relative_to(snapshot).as_posix(), path.stat().st_size)

    def unfinished(self) -> int:
        """Bytes of downloads that were not finished."""
        return sum(path.stat().st_size for path in (self.folder / "blobs").glob("*.incomplete"))


@dataclass(frozen=True)
class LocalModel:
    """A complete model in the cache.

    Attributes:
        name: the name that opens it.
        commit: the revision that it belongs to.
        path: its file, the first one of a split model.
        model: label, parts and size.
    """

    name: HubName
    commit: str
    path: Path
    model: RepoModel = field(repr=False)


def find(name: HubName, *, any_commit: bool = False) -> LocalModel | None:
    """The model that a name means, where all of it is here.

    Args:
        name: what is asked for. Without a quantization it is the default one: that another one is the only one here
            does not make it the only one of the repository.
        any_commit: look into all commits that are here, not only into the one that the revision was last seen at; then
            without a quantization also for the only one that is here.
    """
    repo = Repo.of(name.repo)
    commits = repo.commits() if any_commit else [commit for commit in (repo.commit(name.revision),) if commit]
    for quant in (name.quant or DEFAULT_QUANT, name.quant) if any_commit else (name.quant or DEFAULT_QUANT,):
        for commit in commits:
            models = [model for model in repo.models(commit) if model.complete]
            chosen = choose(models, quant)
            if len(chosen) == 1:
                path = repo.snapshot(commit) / chosen[0].files[0].path
                return LocalModel(name, commit, path, chosen[0])
    return None


def local_models(repo_name: str | None = None) -> list[LocalModel]:
    """All complete models in the cache, or those of one repository.

    Each name is one that opens that file: with the commit where the file is not what the branch main was last seen at,
    and with the file's name where the repository has several of that quantization.
    """
    found = []
    for repo in _repos():
        if repo_name is not None and repo.name.lower() != repo_name.lower():
            continue
        current = repo.commit("main")
        for commit in repo.commits():
            models = [model for model in repo.models(commit) if model.complete]
            for model in models:
                unique = len(choose(models, model.label)) == 1
                quant = model.label if unique else model.files[0].path
                name = HubName(repo.name, quant) if commit == current else HubName(repo.name, quant, commit)
                found.append(LocalModel(name, commit, repo.snapshot(commit) / model.files[0].path, model))
    return found


def unfinished() -> dict[str, int]:
    """Bytes of unfinished downloads, by repository."""
    return {repo.name: size for repo in _repos() if (size := repo.unfinished())}


def _repos() -> list[Repo]:
    folders = sorted(_folders(cache_dir()), key=lambda folder: folder.name.lower())
    matches = [(folder, _FOLDER.fullmatch(folder.name)) for folder in folders]
    return [Repo(f"{match[1]}/{match[2]}", folder) for folder, match in matches if match]


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def remove(found: LocalModel) -> int:
    """Take a model out of the cache, and its content where no other commit uses it; returns the bytes freed.

    What other tools keep of the same repository stays. A process that has the model open keeps it until it ends.
    """
    repo = Repo.of(found.name.repo)
    freed = 0
    for file in found.model.files:
        pointer = repo.snapshot(found.commit) / file.path
        content = _content(pointer)
        pointer.unlink()
        if content == pointer:  # no link: the file system has none, and the content itself was here
            freed += file.size
        elif content.parent == repo.folder / "blobs" and content not in _used_blobs(repo):
            freed += 0 if content.is_symlink() else file.size  # a link: several repositories share the content
            content.unlink(missing_ok=True)
        _remove_empty(pointer.parent, repo.folder / "snapshots")
    if not _folders(repo.folder / "snapshots") and not repo.unfinished():
        shutil.rmtree(repo.folder, ignore_errors=True)
    return freed


def remove_unfinished(repo_name: str) -> int:
    """Delete the unfinished downloads of a repository; returns the bytes freed."""
    repo, freed = Repo.of(repo_name), 0
    for path in (repo.folder / "blobs").glob("*.incomplete"):
        freed += path.stat().st_size
        path.unlink(missing_ok=True)
    if not _folders(repo.folder / "snapshots"):
        shutil.rmtree(repo.folder, ignore_errors=True)
    return freed


def _used_blobs(repo: Repo) -> set[Path]:
    """Contents that some file of some commit links to."""
    walk = os.walk(repo.folder / "snapshots")
    return {_content(Path(folder) / name) for folder, _, names in walk for name in names}


def _content(pointer: Path) -> Path:
    """What a file of a snapshot links to, one link further; itself where it is no link."""
    return Path(os.path.normpath(pointer.parent / os.readlink(pointer))) if pointer.is_symlink() else pointer


def _remove_empty(folder: Path, end: Path) -> None:
    """Remove a folder and those above it, as far as they are empty and below `end`."""
    while folder != end:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
