"""One file of the hub into the cache: resumed where it was broken off, checked, and only then given its name.

A blob gets its name after its digest was compared, so a process that is killed at any moment leaves a shorter
`.incomplete` file and nothing that could be taken for the model.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.errors import DownloadError
from engine.hub.cache import Repo
from engine.hub.client import Client
from engine.hub.names import RepoFile
from engine.units import size_text

log = logging.getLogger("engine")

PIECE = 1 << 20
LOCK_SECONDS = 0.2
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Tell = Callable[[str, int], None]
"""Called with what is done and how many bytes of this file are there."""


def fetch(client: Client, repo: Repo, commit: str, file: RepoFile, tell: Tell, *, check: bool) -> Path:
    """Bring a file into the cache; returns its path in the snapshot.

    Args:
        client: asks the hub.
        repo: place in the cache.
        commit: the revision to take it from.
        file: which one, as the hub lists it.
        tell: progress.
        check: also compare the digest of a file that is here already, and fetch it anew where it differs.

    Raises:
        DownloadError: see Client; also a content that does not have the hub's digest, and a full disk.
    """
    name = Path(file.path).name
    pointer = repo.snapshot(commit) / file.path
    if not check and pointer.exists() and pointer.stat().st_size == file.size:
        return pointer
    remote = client.locate(commit, file.path)
    if not _ETAG.fullmatch(remote.etag) or (file.sha256 and remote.etag != file.sha256) or remote.size != file.size:
        raise DownloadError(
            f"{repo.name}: the hub contradicts itself about {file.path}: listed as {file.size} bytes, SHA-256 "
            f"{file.sha256 or 'unknown'}, offered as {remote.size} bytes, ETag {remote.etag}: try again later"
        )
    blob = repo.blob(remote.etag)
    try:
        with _locked(repo.lock(remote.etag), lambda: tell(f"waiting for another process that fetches {name}", 0)):
            content = next((path for path in (pointer, blob) if path.exists()), None)
            if content is not None and not _is_whole(content, remote.etag, file, tell, check=check):
                log.warning("%s is damaged: fetching it again", content)
                for path in (pointer, blob):  # the links: what they may share with other repositories is not ours
                    path.unlink(missing_ok=True)
                content = None
            if content is None:
                _write(blob, lambda out: client.read(remote, out), file, remote.etag, tell)
            if content != pointer:
                _link(blob, pointer)
    except OSError as error:
        raise _disk_error(error, repo, file) from error
    tell(f"checked {name}", file.size)
    return pointer


def _is_whole(path: Path, etag: str, file: RepoFile, tell: Tell, *, check: bool) -> bool:
    if path.stat().st_size != file.size:
        return False
    if not check:
        return True
    with path.open("rb") as content:
        digest = _Digest(etag, file.size)
        digest.read(content, lambda done: tell(f"checking {path.name}", done))
    return digest.matches


def _write(
    blob: Path, read: Callable[[BinaryIO], None], file: RepoFile, etag: str, tell: Tell, *, again: bool = True
) -> None:
    """Write a blob's content under its temporary name, compare the digest, rename."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.incomplete")
    name = Path(file.path).name
    resumed = False
    try:
        with _Partial(partial, etag, file, lambda done: tell(f"downloading {name}", done)) as out:
            resumed = out.size > 0
            _check_room(blob.parent, file, out.size)
            tell(f"downloading {name}", out.size)
            read(cast(BinaryIO, out))
            if out.size != file.size:
                raise DownloadError(f"{file.path}: found {out.size} bytes; allowed: {file.size}, as the hub lists it")
            if not out.digest.matches:
                raise _WrongContentError(
                    f"{file.path}: the content that came has not the checksum {etag} that the hub lists: try again; "
                    "if that repeats, a proxy or the disk changes it"
                )
    except _WrongContentError:
        partial.unlink(missing_ok=True)
        if not resumed or not again:
            raise
        # The part that was here, or a server that ignored where to go on from, can be the reason: once from the start.
        log.warning("%s: the resumed download has a wrong checksum: fetching it from the start", name)
        _write(blob, read, file, etag, tell, again=False)
        return
    partial.replace(blob)


class _WrongContentError(DownloadError):
    """The bytes are not those of the file: no use to go on from them."""


class _Digest:
    """SHA-256 of a content, or the hash that git gives it, by the length of the wanted one."""

    def __init__(self, wanted: str, size: int) -> None:
        self._wanted = wanted
        self._hash: Any = hashlib.sha256() if len(wanted) == 64 else hashlib.sha1(usedforsecurity=False)
        if len(wanted) == 40:
            self._hash.update(b"blob %d\0" % size)

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        self._hash.update(data)

    def read(self, content: BinaryIO, tell: Callable[[int], None]) -> int:
        """Take all that a file holds; returns the number of bytes."""
        done = 0
        while data := content.read(PIECE):
            self._hash.update(data)
            done += len(data)
            tell(done)
        return done

    @property
    def matches(self) -> bool:
        """Whether the content so far has the wanted digest."""
        return bool(self._hash.hexdigest() == self._wanted)


class _Partial:
    """The file that a download is appended to: continues what is there, hashes and counts what comes.

    Has what http_get() uses of a file: write, tell, flush, and seek and truncate to a shorter length.
    """

    def __init__(self, path: Path, etag: str, file: RepoFile, tell: Callable[[int], None]) -> None:
        self._etag, self._expected, self._tell, self._label = etag, file, tell, path
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by __exit__
        self.digest = _Digest(etag, file.size)
        self.size = 0
        try:
            if os.fstat(self._file.fileno()).st_size > file.size:
                self._file.truncate(0)
            self.size = self.digest.read(self._file, tell)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.flush()
            if kind is None:  # the name that follows must not outlive the content in a loss of power
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: bytes) -> int:
        """Append bytes."""
        if self.size + len(data) > self._expected.size:
            raise _WrongContentError(
                f"{self._expected.path}: more than the {self._expected.size} bytes came that the hub lists: try again"
            )
        self._file.write(data)
        self._file.flush()
        self.digest.add(data)
        self.size += len(data)
        self._tell(self.size)
        return len(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.size

    def flush(self) -> None:
        """Bytes are written when they come."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go back to the start, from which a server gave everything anew, or stay at the end."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.size, os.SEEK_END: self.size}[whence] + offset
        if begin not in (0, self.size):
            raise OSError(errno.ESPIPE, "a download continues at its end or starts anew", str(self._label))
        if begin == 0 and self.size:
            self._file.seek(0)
            self._file.truncate()
            self.digest, self.size = _Digest(self._etag, self._expected.size), 0
        return begin

    def truncate(self, size: int | None = None) -> int:
        """Cut at the present end, which seek() has done."""
        if size not in (None, self.size):
            self.seek(size or 0)
        return self.size


def _check_room(folder: Path, file: RepoFile, done: int) -> None:
    free = shutil.disk_usage(folder).free
    if file.size - done > free:
        raise DownloadError(
            f"{file.path}: {size_text(file.size - done)} are to be fetched and {folder} has {size_text(free)} free: "
            "make room (`gguf-engine list`, `gguf-engine rm`), choose a smaller quantization, or set HF_HOME to a "
            "folder on another disk"
        )


def _disk_error(error: OSError, repo: Repo, file: RepoFile) -> DownloadError:
    where = f"{repo.name}: {file.path}"
    if error.errno in _FULL:
        return DownloadError(
            f"{where}: the disk of {repo.folder} is full ({error.strerror}): make room (`gguf-engine list`, "
            "`gguf-engine rm`) or set HF_HOME to a folder on another disk; what has come is kept and continued"
        )
    return DownloadError(
        f"{where}: the cache cannot be written: {error.filename or repo.folder}: {error.strerror or error}: check its "
        "permissions, or set HF_HOME to another folder"
    )


def _link(blob: Path, pointer: Path) -> None:
    """Give a blob its name in a snapshot; where the file system has no links, the content itself goes there."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        pointer.unlink()  # a link to a blob that is gone
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError as error:
        if error.errno in _FULL:
            raise
        blob.replace(pointer)


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes from writing the same blob, by the lock that all Hugging Face tools take.

    Systems without flock (Windows) go without: two processes would fetch the same file twice.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                time.sleep(LOCK_SECONDS)
                continue
            # The one who held it before may have deleted it, and a third one has locked a new file of that name.
            try:
                if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                    continue
            except FileNotFoundError:
                continue
            yield
            return
