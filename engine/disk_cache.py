"""Files of compiled code that can be made again: a file is whole and as it was written, or it counts as absent.

A damaged file (cut by a crash or a full disk, changed by a failing drive) must neither be run nor stay: reading it
gives None and removes it, so that its owner makes the content anew and writes it. Knows nothing of what it means.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from contextlib import suppress
from pathlib import Path

_HEADER = struct.Struct("<8sQ32s")
"""Magic, bytes of content, SHA-256 of the content; the content follows."""

_MAGIC = b"GGUFEC1\n"


def read(path: Path) -> bytes | None:
    """The content that write() put there; None where there is none, or the file is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[_HEADER.size :]
    if data[: _HEADER.size] == _header(content):
        return content
    remove(path)
    return None


def write(path: Path, content: bytes) -> bool:
    """Put content there; False where the file system refuses it, and then no part of it is left.

    Other processes see the whole file or what was there before.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("xb") as file:
            file.write(_header(content))
            file.write(content)
        scratch.replace(path)
    except OSError:
        remove(scratch)
        return False
    except BaseException:  # an interrupt
        remove(scratch)
        raise
    return True


def remove(path: Path) -> None:
    """Remove a file; one that cannot be removed does no harm."""
    with suppress(OSError):
        os.unlink(path)


def _header(content: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, len(content), hashlib.sha256(content).digest())
