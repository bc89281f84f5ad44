"""The hub's protocol, by huggingface_hub: what is in a repository, and bytes of its files.

The only module that imports huggingface_hub, of which it uses what all versions since the oldest allowed one have. That
package's own download is not used: its newer versions begin an interrupted file anew. Every failure becomes a
DownloadError; HubUnavailableError where asking later, or not at all, may help.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from engine import __version__
from engine.errors import DownloadError
from engine.hub.cache import COMMIT
from engine.hub.names import HubName, RepoFile

log = logging.getLogger("engine")

PIECE = 1 << 20
PAUSE = 1.0
"""Seconds before a broken connection is taken up again."""
FRUITLESS = 3
"""Attempts in a row that bring no byte before a download is given up; what came is kept."""
SECONDS = 10.0
"""How long the hub may take to answer a question; huggingface_hub has the same for its own."""

_NETWORK_PACKAGES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "ssl", "socket")


class HubUnavailableError(DownloadError):
    """The hub cannot be reached, fails, or limits requests: a file that is here can be used instead."""


@dataclass(frozen=True)
class Listing:
    """What a repository holds.

    Attributes:
        commit: the revision's commit.
        files: all files.
    """

    commit: str
    files: tuple[RepoFile, ...]


@dataclass(frozen=True)
class RemoteFile:
    """Where a file of a commit is.

    Attributes:
        url: the address to read from.
        etag: SHA-256 of the content, or git's hash of a small file; the name of its blob.
        size: bytes.
    """

    url: str
    etag: str
    size: int


def endpoint() -> str:
    """The address of the hub: HF_ENDPOINT, or Hugging Face."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


class Client:
    """Questions about one name."""

    def __init__(self, name: HubName) -> None:
        self._name = name

    def listing(self) -> Listing:
        """The repository at the revision of the name.

        Raises:
            DownloadError: there is no such repository or revision, or it needs a token.
            HubUnavailableError: the hub does not answer.
        """
        with self._errors():
            from huggingface_hub import HfApi

            api = HfApi(endpoint=endpoint(), library_name="gguf-engine", library_version=__version__)
            info = api.model_info(
                self._name.repo, revision=self._name.revision, files_metadata=True, timeout=SECONDS, token=_token()
            )
            if not COMMIT.fullmatch(str(info.sha)):  # it becomes the name of a folder
                raise self._no_hub(f"commit {info.sha!r}")
            files = []
            for entry in info.siblings or ():
                lfs: Any = entry.lfs or {}
                sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
                files.append(RepoFile(entry.rfilename, entry.size or 0, sha256 or ""))
            return Listing(str(info.sha), tuple(files))

    def locate(self, commit: str, path: str) -> RemoteFile:
        """Ask for the head of a file.

        Raises:
            DownloadError: it is not there, or needs a token.
            HubUnavailableError: the hub does not answer.
        """
        with self._errors():
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

            url = hf_hub_url(self._name.repo, path, revision=commit, endpoint=endpoint())
            head = get_hf_file_metadata(url, token=_token(), timeout=SECONDS)
        if head.etag is None or head.size is None:
            raise self._no_hub(f"neither ETag nor size of {path}")
        return RemoteFile(url, head.etag, head.size)

    def read(self, file: RemoteFile, target: BinaryIO) -> None:
        """Append what a file lacks; broken connections are taken up again until FRUITLESS attempts brought nothing.

        Raises:
            DownloadError: as in locate(); also for a content of another length.
            OSError: the target cannot be written.
        """
        fruitless = 0
        while True:
            done = target.tell()
            try:
                self._read_once(file, target, done)
                return
            except HubUnavailableError as error:
                fruitless = 0 if target.tell() != done else fruitless + 1
                if fruitless == FRUITLESS:
                    raise
                log.warning("%s: going on at %d of %d bytes", error, target.tell(), file.size)
                time.sleep(PAUSE)

    def _read_once(self, file: RemoteFile, target: BinaryIO, begin: int) -> None:
        with self._errors():
            from huggingface_hub.file_download import http_get
            from huggingface_hub.utils import build_hf_headers

            headers = build_hf_headers(token=_token(), library_name="gguf-engine", library_version=__version__)
            headers["Accept-Encoding"] = "identity"  # the length told, and the place to go on from, are of the file
            http_get(file.url, target, resume_size=begin, headers=headers, expected_size=file.size)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of huggingface_hub and of the network, in the words of this package."""
        with _quiet:
            try:
                yield
            except DownloadError:
                raise
            except Exception as error:
                translated = self._translated(error)
                if translated is None:
                    raise
                raise translated from error

    def _no_hub(self, found: str) -> DownloadError:
        return HubUnavailableError(
            f"{self._name}: {endpoint()} does not answer like a Hugging Face hub ({found}): check HF_ENDPOINT and "
            "proxies"
        )

    def _translated(self, error: Exception) -> DownloadError | None:
        from huggingface_hub import errors

        name, hub = self._name, endpoint()
        page = f"{hub}/{name.repo}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            what = "the token in use has no access" if _has_token() else "no token is set"
            return DownloadError(
                f"{name}: the model is given only to accounts that accepted its terms, and {what}: accept them on "
                f"{page}, then set HF_TOKEN to a token of that account"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return DownloadError(
                f"{name}: the repository has no revision {name.revision!r}: {page} shows its branches, tags and commits"
            )
        if isinstance(error, errors.EntryNotFoundError):
            return DownloadError(f"{name}: a file that was listed is gone: try again")
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
            what = "the token in use has no access to it" if _has_token() else "it is private and no token is set"
            return DownloadError(
                f"{name}: {hub} answered {status}: there is no such model, or {what}: check the name on {page}; "
                "for a private model set HF_TOKEN"
            )
        if status == 429:
            after = error.response.headers.get("Retry-After")  # type: ignore[attr-defined]
            wait = f"try again in {after} s" if after else "try again later"
            remedy = wait if _has_token() else f"{wait}, or set HF_TOKEN, which raises the limit"
            return HubUnavailableError(f"{name}: {hub} limits requests (429): {remedy}")
        if status is not None:
            return HubUnavailableError(f"{name}: {hub} answered {status}: try again later")
        if isinstance(error, RuntimeError) and "hf_transfer" in str(error):
            return DownloadError(
                f"{name}: hf_transfer writes past what has come and its checksum: unset HF_HUB_ENABLE_HF_TRANSFER"
            )
        if type(error).__name__ == "JSONDecodeError":  # of json, or of the client's package
            return self._no_hub(_line(error))
        if "too large to be downloaded" in str(error):
            return DownloadError(
                f"{name}: a file of more than 50 GB is not given by plain HTTPS: fetch it with `hf download "
                f"{name.repo}`, which writes into the same cache"
            )
        if isinstance(error, ValueError) and not isinstance(error, OSError):  # a name that the library refuses
            return DownloadError(f"{name}: {_line(error)}")
        if isinstance(error, OSError) and error.errno is None and "Consistency check" in str(error):
            return DownloadError(f"{name}: the file that came has another length than {hub} told: try again")
        if (
            isinstance(error, (ConnectionError, TimeoutError))
            or type(error).__module__.split(".")[0] in _NETWORK_PACKAGES
        ):
            return HubUnavailableError(
                f"{name}: {hub} cannot be reached ({_line(error)}): check the network, HF_ENDPOINT and proxies; "
                "`gguf-engine list` shows the models that are here"
            )
        return None


def _token() -> str | bool | None:
    """HF_TOKEN as it is now; None leaves it to huggingface_hub, which also reads the token of `hf auth login`."""
    return (os.environ.get("HF_TOKEN") or "").strip() or None


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(_token() or get_token())


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


class _Forward(logging.Handler):
    """Warnings of huggingface_hub ("trying to resume ...") as single lines of this package's log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.log(record.levelno, "%s", " ".join(record.getMessage().split()))


class _Quiet:
    """Settings of huggingface_hub that its callers share, changed while at least one thread downloads.

    Its progress bars are off, as this package shows its own; its warnings go to this package's log; and contents come
    in pieces of PIECE bytes instead of ten million, so that of a broken connection only a small piece is lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._change()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            while not self._users and self._restore:
                self._restore.pop()()

    def _change(self) -> None:
        from huggingface_hub import constants, file_download
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        theirs = logging.getLogger("huggingface_hub")
        changes: list[tuple[object, str, object]] = [(theirs, "handlers", [_Forward()]), (theirs, "propagate", False)]
        for module in (constants, file_download):
            if hasattr(module, "DOWNLOAD_CHUNK_SIZE"):
                changes.append((module, "DOWNLOAD_CHUNK_SIZE", PIECE))
        for owner, attribute, value in changes:
            self._restore.append(partial(setattr, owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
        if not are_progress_bars_disabled():
            disable_progress_bars()
            self._restore.append(enable_progress_bars)


_quiet = _Quiet()
