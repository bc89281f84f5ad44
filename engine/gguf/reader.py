"""GGUF files on disk: mapped into memory, tensors handed out as views, split files joined.

Owns the mappings; independent of models. parse.py reads and checks the header.
"""

import logging
import mmap
import os
import stat
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from engine.errors import GGUFError
from engine.gguf.cursor import MetadataValue
from engine.gguf.parse import METADATA_START, Header, TensorInfo, parse_header
from engine.split_names import part_name

__all__ = ["GGUFFile", "MetadataValue", "TensorInfo", "open_gguf"]

log = logging.getLogger("engine")


class GGUFFile:
    """An open GGUF file, or all parts of a split one.

    Views given out stay valid after close(): the mapping stays until the last of them is deleted.

    Attributes:
        path: the file that was asked for.
        parts: all files, in order; one unless the model is split.
        version: of the (first) file, 2 or 3.
        alignment: of tensor data, in bytes, in the (first) file.
        file_size: bytes of all parts.
        metadata: by key; of the first part where the model is split.
        tensors: by name, in file order, part after part.
    """

    path: Path
    parts: tuple[Path, ...]
    version: int
    alignment: int
    file_size: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open and check path; open_gguf is the usual way in."""
        self.path = Path(path)
        self.tensors = {}
        self._parts: list[_Part] = []
        self._closed = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        asked = self._map(self.path)
        paths = _part_paths(self.path, asked.header.metadata)
        parts = [asked if path == self.path else self._map(path) for path in paths]
        for i, part in enumerate(parts):
            if len(parts) > 1:
                _check_part(part, i, len(parts))
        self._parts = parts
        self.parts = tuple(paths)
        self.version = parts[0].header.version
        self.alignment = parts[0].header.alignment
        self.metadata = parts[0].header.metadata
        self.file_size = sum(part.size for part in parts)
        for i, part in enumerate(parts):
            for name, info in part.header.tensors.items():
                if name in self.tensors:
                    other = paths[self.tensors[name].part]
                    raise GGUFError(f"{part.path}: tensor {name!r}: found also in {other}; allowed: each name once")
                self.tensors[name] = replace(info, part=i) if i else info
        repaired = list(dict.fromkeys(key for part in parts for key in part.header.repaired))
        if repaired:
            log.warning(
                "%s: text that is not UTF-8 in metadata %s: what could not be decoded is shown as U+FFFD",
                self.path,
                ", ".join(repaired[:8]) + (f" and {len(repaired) - 8} more" if len(repaired) > 8 else ""),
            )
        total = self.metadata.get("split.tensors.count")
        if len(parts) > 1 and total is not None and total != len(self.tensors):
            raise GGUFError(
                f"{paths[0]}: metadata 'split.tensors.count': found {total}; allowed: {len(self.tensors)}, "
                "the tensors in all parts (do the parts belong together?)"
            )

    def _map(self, path: Path) -> "_Part":
        part = _Part(path)
        self._parts.append(part)
        part.header = parse_header(path, part.data)
        return part

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's packed bytes: uint8, shape (*shape[:-1], row_bytes), read-only, not copied.

        Raises:
            GGUFError: no such tensor, the file is closed, or it has been cut or rewritten since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(
                f"{self.path}: tensor {name!r}: not found; allowed: the {len(self.tensors)} tensors in the file"
            )
        if self._closed:
            raise GGUFError(f"{self.path}: the file is closed; open it again to read tensor {name!r}")
        part = self._parts[info.part]
        part.check_unchanged()
        flat = np.frombuffer(part.data, np.uint8, info.n_bytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.row_bytes)

    def check_unchanged(self) -> None:
        """Notice that a file was cut or rewritten in place since it was opened; one fstat per part.

        Reading weights from it would give other weights, or end the process with SIGBUS. A cut between this call and
        the reading still does, and a network file system may report a change late. Closed files are not looked at.

        Raises:
            GGUFError: size or time of modification are others than when the file was opened.
        """
        for part in self._parts:
            part.check_unchanged()

    def metadata_block(self) -> bytes:
        """Return the metadata of the (first) file as it is written there, e.g. to write it into another file.

        Raises:
            GGUFError: the file is closed, or it has been cut or rewritten since it was opened.
        """
        if self._closed:
            raise GGUFError(f"{self.path}: the file is closed; open it again to read its metadata")
        part = self._parts[0]
        part.check_unchanged()
        return bytes(part.data[METADATA_START : part.header.metadata_end])

    def close(self) -> None:
        """Release mappings and memory. Metadata and tensor directory stay readable.

        A call that was cut short can be repeated; after one that was not a further call does nothing.
        """
        self._closed = True
        while self._parts:
            self._parts[-1].close()
            self._parts.pop()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {self.file_size} bytes)"


def _files_in(folder: Path) -> str:
    """What a person who named a folder may have meant."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return f" with {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else ""


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; given any part of a split one, all its parts.

    Raises:
        GGUFError: the file is missing or malformed; the text names file, field, what was found and what is allowed.
    """
    return GGUFFile(path)


class _Part:
    """One mapped file."""

    header: Header

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # The mode is looked at first: opening a named pipe would wait for a writer.
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                found = f"a directory{_files_in(path)}" if stat.S_ISDIR(mode) else "a device or pipe"
                raise GGUFError(f"{path}: found {found}; allowed: a GGUF file")
            self.file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise GGUFError(f"{path}: cannot be opened: {reason}; check the path and its permissions") from error
        self.data: mmap.mmap | bytes = b""
        try:
            state = os.fstat(self.file.fileno())
            self.size, self.modified = state.st_size, state.st_mtime_ns
            if self.size:
                self.data = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            self.file.close()
            raise GGUFError(f"{path}: cannot be mapped into memory: {error}") from error

    def check_unchanged(self) -> None:
        state = os.fstat(self.file.fileno())
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
            found = f"{state.st_size} bytes" if state.st_size != self.size else "another time of modification"
            raise GGUFError(
                f"{self.path}: size and time: found {found}; allowed: {self.size} bytes not written to, as when it "
                "was opened: open the model again, and give a new version its name by renaming it"
            )

    def close(self) -> None:
        self.file.close()
        if isinstance(self.data, mmap.mmap):
            try:
                self.data.close()
            except BufferError:  # views exist: deleting the last one unmaps the file; its pages are released now
                if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                    self.data.madvise(mmap.MADV_DONTNEED)
            self.data = b""


def _part_paths(path: Path, metadata: dict[str, MetadataValue]) -> list[Path]:
    """Return the paths of all parts, in order; just path where the file is not split."""
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= 99999:
        raise GGUFError(f"{path}: metadata 'split.count': found {count!r}; allowed: an integer, 0 to 99999")
    if count <= 1:
        return [path]
    part = part_name(path.name)
    if part is None or part.count != count:
        raise GGUFError(
            f"{path}: file name of a part: found {path.name!r}; allowed: NAME-00001-of-{count:05d}.gguf and so on, "
            f"for the file says that it is one of {count} parts: give the parts their names back"
        )
    number = metadata.get("split.no")
    if number != part.number - 1:
        raise GGUFError(
            f"{path}: metadata 'split.no': found {number!r}; allowed: {part.number - 1}, as the file name says"
        )
    paths = [path.with_name(name) for name in part.all_names()]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise GGUFError(f"{path}: parts: found {count - len(missing)} of {count}; put {names} next to it")
    return paths


def _check_part(part: "_Part", index: int, count: int) -> None:
    for key, expected in (("split.no", index), ("split.count", count)):
        found = part.header.metadata.get(key)
        if found != expected:
            raise GGUFError(
                f"{part.path}: metadata {key!r}: found {found!r}; allowed: {expected}, as the other parts say"
            )
