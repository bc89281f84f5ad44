"""numba's disk cache with files that are checked before they are used, and repaired where they are damaged.

numba itself raises on a damaged file and never replaces it, and it would run machine code in which single bytes are
wrong. Names and folders of the files are numba's: an index (.nbi) and a data file (.nbc) for every kernel.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import numba
from numba import config
from numba.core.caching import FunctionCache, IndexDataCacheFile

from engine import disk_cache

log = logging.getLogger("engine")

_FOLDERS = ("UserProvidedCacheLocator", "InTreeCacheLocator", "UserWideCacheLocator")
"""Endings of the names of numba's classes that look for a folder, in its order; the others are for notebooks and zip
files."""


class _CheckedFiles(IndexDataCacheFile):  # type: ignore[misc] # numba has no types
    """Index and data of one kernel; a damaged file counts as absent."""

    def _load_index(self) -> dict[Any, str]:
        """Names of data files by kernel signature and processor."""
        found = _load(self._index_path)
        if found is None or found[:2] != (numba.__version__, self._source_stamp):
            return {}
        return dict(_unpickle(self._index_path, found[2]) or {})

    def _save_index(self, overloads: dict[Any, str]) -> None:
        # The names apart: their keys may hold classes that another version of numba lacks.
        head = numba.__version__, self._source_stamp, self._dump(overloads)
        _write(self._index_path, pickle.dumps(head))

    def _load_data(self, name: str) -> Any:
        return _load(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        _write(self._data_path(name), self._dump(data))


class KernelCache(FunctionCache):  # type: ignore[misc]
    """The cache of one kernel.

    Args:
        function: the Python function.

    Raises:
        RuntimeError: no folder can be written to; names them.
    """

    def __init__(self, function: Any) -> None:
        try:
            super().__init__(function)
        except Exception as error:
            found = "; ".join(_refusals(function)) or str(error)
            raise RuntimeError(f"no folder for them can be written ({found})") from error
        locator = self._impl.locator
        self._cache_file = _CheckedFiles(self.cache_path, self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled kernel; None where it is not there or cannot be used, and then it is compiled and saved."""
        try:
            return super().load_overload(signature, target_context)
        except Exception:
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Save a compiled kernel; where that fails (a full disk), the next process compiles it again."""
        try:
            super().save_overload(signature, compiled)
        except Exception as error:
            warn_not_kept(str(error))


_told: list[str] = []
"""The warning of this process, once it was given."""


def warn_not_kept(reason: str) -> None:
    """Say that a kernel is compiled which the next start will compile again; once per process, as all have one cause.

    Args:
        reason: why it is not kept.
    """
    if _told:
        return
    _told.append(
        f"compiled CPU kernels are not kept: {reason}. So every start compiles them again, which takes about 10 s; set "
        "NUMBA_CACHE_DIR to a folder that can be written and has 20 MB of room"
    )
    log.warning("%s", _told[0])


def _refusals(function: Any) -> list[str]:
    """Each folder that numba tries, and why it cannot be written."""
    found = []
    for locator in FunctionCache._impl_class._locator_classes:
        name = locator.__name__
        if not name.endswith(_FOLDERS) or (name.endswith(_FOLDERS[0]) and not config.CACHE_DIR):
            continue
        one = locator(function, inspect.getfile(function))
        try:
            one.ensure_cache_path()
        except OSError as error:
            found.append(f"{one.get_cache_path()}: {error.strerror or error}")
    return found


def _load(path: str) -> Any:
    """The object that a file holds; None where there is none that can be used."""
    content = disk_cache.read(Path(path))
    return None if content is None else _unpickle(path, content)


def _unpickle(path: str, content: bytes) -> Any:
    try:
        return pickle.loads(content)
    except Exception:  # a pickle can fail with any error
        disk_cache.remove(Path(path))
        return None


def _write(path: str, content: bytes) -> None:
    if not disk_cache.write(Path(path), content):
        raise OSError(f"{path} cannot be written")
