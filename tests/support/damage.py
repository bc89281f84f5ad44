"""Ways in which a file of a cache is found damaged, and what a disk without room does."""

import builtins
import io
from pathlib import Path


def flipped(data):
    """One bit in the middle is wrong."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


WAYS = {
    "empty": lambda data: b"",
    "cut to its beginning": lambda data: data[:20],
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "garbage": lambda data: bytes(range(256)) * 20,
    "zeros": lambda data: bytes(len(data)),
    "one bit wrong": flipped,
    "longer": lambda data: data + b"more",
}


def fill_disk(monkeypatch, room):
    """Every file that is written from now on has room for so many bytes."""

    class Full(io.FileIO):
        def write(self, data):
            written = super().write(memoryview(data)[: max(0, room - self.tell())])
            if written < len(data):
                raise OSError(28, "No space left on device")
            return written

    def opened(path, mode="r", *args, **options):
        return Full(path, mode.replace("b", "")) if "b" in mode and "r" not in mode else builtins.open(path, mode)

    monkeypatch.setattr(Path, "open", opened)
