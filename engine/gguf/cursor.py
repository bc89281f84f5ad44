"""A cursor over the untrusted bytes of a GGUF file: numbers, strings and metadata values.

Every count and length is checked against the size of the buffer before it is used, so the work and the memory are
bounded by the file. `field` names what is being read, for errors. Every method raises GGUFError where bytes are missing
or malformed.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from engine.errors import GGUFError

MAX_NAME_BYTES = 65535
MAX_ARRAY_DEPTH = 8

# Value types: id -> (name, numpy dtype in the file's byte order). 8 is a string, 9 an array.
NUMBER_TYPES: dict[int, tuple[str, np.dtype[Any]]] = {
    0: ("UINT8", np.dtype("<u1")),
    1: ("INT8", np.dtype("<i1")),
    2: ("UINT16", np.dtype("<u2")),
    3: ("INT16", np.dtype("<i2")),
    4: ("UINT32", np.dtype("<u4")),
    5: ("INT32", np.dtype("<i4")),
    6: ("FLOAT32", np.dtype("<f4")),
    7: ("BOOL", np.dtype("?")),
    10: ("UINT64", np.dtype("<u8")),
    11: ("INT64", np.dtype("<i8")),
    12: ("FLOAT64", np.dtype("<f8")),
}
STRING, ARRAY, UINT32 = 8, 9, 4
_EMPTY = {value_type: np.empty(0, dtype.type) for value_type, (_, dtype) in NUMBER_TYPES.items()}

DECIDING_KEYS = ("general.architecture", "general.type")
DECIDING_WITHIN = ("tokenizer.ggml.",)
"""Texts that must be valid UTF-8: names that decide what a file is, and vocabularies. Other texts only describe."""

# The fewest bytes each can take: what a count is checked against before anything is read.
MIN_STRING = 8
MIN_ARRAY = 4 + 8

MetadataValue = int | float | bool | str | list[Any] | np.ndarray
"""Scalars are Python's, arrays of numbers numpy's, arrays of strings list[str], arrays of arrays lists of those."""


class Cursor:
    """A cursor over untrusted bytes."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.repaired: list[str] = []
        self.key = ""  # whose value is being read

    def fail(self, field: str, found: str, allowed: str) -> NoReturn:
        """Raise a GGUFError that names the file and the field, and says what was found and what is allowed."""
        raise GGUFError(f"{self.path}: {field}: found {found}; allowed: {allowed}")

    # -- primitives ------------------------------------------------------------------------------------------------

    def take(self, n: int, field: str) -> int:
        """Advance over n bytes and return where they start."""
        start = self.pos
        if n > self.size - start:
            left = self.size - start
            self.fail(field, f"{n} bytes at offset {start}", f"the {left} bytes left in the file (is it cut short?)")
        self.pos = start + n
        return start

    def uint32(self, field: str) -> int:
        """The next four bytes."""
        return int.from_bytes(self.data[(start := self.take(4, field)) : start + 4], "little")

    def uint64(self, field: str) -> int:
        """The next eight bytes."""
        return int.from_bytes(self.data[(start := self.take(8, field)) : start + 8], "little")

    def count(self, field: str, min_bytes: int) -> int:
        """A count of things that take at least min_bytes each."""
        n = self.uint64(field)
        left = self.size - self.pos
        if n * min_bytes > left:
            self.fail(
                field,
                str(n),
                f"0 to {left // min_bytes}, what the {left} bytes left in the file can hold (is it cut short?)",
            )
        return n

    def string(self, field: str) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.uint64(f"{field} length")
        start = self.take(length, field)
        return self.decode(field, start, length)

    def repairs(self) -> bool:
        """Whether the text being read may be repaired; if so the key is noted."""
        if not self.key or self.key in DECIDING_KEYS or self.key.startswith(DECIDING_WITHIN):
            return False
        if self.key not in self.repaired:
            self.repaired.append(self.key)
        return True

    def decode(self, field: str, start: int, length: int) -> str:
        """The text of these bytes; what is no UTF-8 becomes U+FFFD where the text may be repaired."""
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            if self.repairs():
                return self.data[start : start + length].decode(errors="replace")
            self.fail(field, f"byte {error.object[error.start]:#04x} at offset {start + error.start}", "valid UTF-8")

    def name(self, field: str) -> str:
        """A string of 1 to MAX_NAME_BYTES bytes."""
        length = int.from_bytes(self.data[self.pos : self.pos + 8], "little")
        if self.size - self.pos >= 8 and not 1 <= length <= MAX_NAME_BYTES:
            self.fail(f"{field} length", str(length), f"1 to {MAX_NAME_BYTES} bytes")
        return self.string(field)

    # -- metadata --------------------------------------------------------------------------------------------------

    def value(self, field: str, value_type: int) -> MetadataValue:
        """A metadata value of one of the types of NUMBER_TYPES, a string or an array."""
        if value_type == STRING:
            return self.string(field)
        if value_type == ARRAY:
            return self.array(field, 1)
        number: int | float | bool = self.numbers(field, value_type, 1)[0].item()
        return number

    def numbers(self, field: str, value_type: int, n: int) -> np.ndarray:
        """Copy n numbers out of the file (a copy: a view could be misaligned and would pin the mapping)."""
        dtype = NUMBER_TYPES[value_type][1]
        if n == 0:
            return _EMPTY[value_type]
        start = self.take(n * dtype.itemsize, field)
        if dtype == np.bool_:
            raw = np.frombuffer(self.data, np.uint8, n, start)
            if (worst := int(raw.max())) > 1:
                del raw
                self.fail(field, f"byte {worst} as a BOOL", "0 or 1")
            return raw.astype(np.bool_)
        return np.frombuffer(self.data, dtype, n, start).astype(dtype.type)

    def array(self, field: str, depth: int) -> list[Any] | np.ndarray:
        """An array, inside `depth` - 1 others."""
        value_type = self.uint32(f"{field} element type")
        if value_type == STRING:
            return self.strings(field, self.count(f"{field} count", MIN_STRING))
        if value_type == ARRAY:
            if depth == MAX_ARRAY_DEPTH:
                self.fail(field, f"arrays nested deeper than {depth}", f"at most {MAX_ARRAY_DEPTH} levels")
            n = self.count(f"{field} count", MIN_ARRAY)
            return [self.array(field, depth + 1) for _ in range(n)]
        if value_type not in NUMBER_TYPES:
            self.fail(f"{field} element type", str(value_type), "0 to 12")
        return self.numbers(field, value_type, self.count(f"{field} count", NUMBER_TYPES[value_type][1].itemsize))

    def strings(self, field: str, n: int) -> list[str]:
        """Vocabularies: hundreds of thousands of short strings, hence a loop of local names and few calls."""
        data, size, pos = self.data, self.size, self.pos
        length_at: Callable[[Any, int], tuple[int]] = struct.Struct("<Q").unpack_from
        out: list[str] = []
        append = out.append
        start = end = pos
        try:
            for _ in range(n):
                start = pos + 8
                end = start + length_at(data, pos)[0]
                if end > size:
                    break
                append(data[start:end].decode())  # twice as fast as str(…, "utf-8")
                pos = end
        except struct.error:
            end = size + 1  # not even the length fits
        except UnicodeDecodeError:
            if self.repairs():
                return [self.string(f"{field}[{i}]") for i in range(n)]
            self.decode(f"{field}[{len(out)}]", start, end - start)
        if len(out) < n:
            self.pos = min(start, size)
            self.take(max(end - start, 1), f"{field}[{len(out)}]")
        self.pos = pos
        return out
