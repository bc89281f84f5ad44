"""One GGUF file's header: metadata and tensor directory, read from an untrusted byte buffer.

Every count, length and offset is checked against the size of the buffer before it is used, so the work and the memory
are bounded by the file. Knows nothing of mapping, of split files or of models.
Format: the GGUF document in ggml's docs/gguf.md (little-endian, versions 2 and 3).
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from engine.errors import GGUFError
from engine.gguf.types import REMOVED_TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 30
MAX_NAME_BYTES = 65535
MAX_ARRAY_DEPTH = 8
MAX_DIMS = 4
METADATA_START = 24
"""Behind magic, version and the counts of tensors and of metadata."""

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
"""Texts that must be right to the byte: names that decide what a file is, and vocabularies. Others describe."""

# The fewest bytes each can take: what a count is checked against before anything is read.
MIN_STRING = 8
MIN_ARRAY = 4 + 8
MIN_PAIR = MIN_STRING + 1 + 4 + 1
MIN_TENSOR = MIN_STRING + 1 + 4 + 8 + 4 + 8

MetadataValue = int | float | bool | str | list[Any] | np.ndarray
"""Scalars are Python's, arrays of numbers numpy's, arrays of strings list[str], arrays of arrays lists of those."""

_OTHER_FILES = (
    (b"lmgg", "an old GGML file from before GGUF; convert the model again with a current converter"),
    (b"fmgg", "an old GGMF file from before GGUF; convert the model again with a current converter"),
    (b"tjgg", "an old GGJT file from before GGUF; convert the model again with a current converter"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint; convert it to GGUF first"),
    (b"version http", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<", "a web page; download the file itself, not the page about it"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is in the file and how to read it.

    Attributes:
        name: as in the file, for example "blk.0.attn_q.weight".
        type: how its elements are packed.
        shape: numpy order, outermost first: a matrix is (rows, cols) and rows are packed one after the other.
        n_bytes: packed size.
        offset: absolute position in its part.
        part: index into GGUFFile.parts.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    n_bytes: int
    offset: int
    part: int = 0

    @property
    def n_elements(self) -> int:
        """Number of elements, unpacked."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Packed bytes of one row (the innermost dimension)."""
        return self.shape[-1] // self.type.block_size * self.type.type_size


@dataclass(frozen=True)
class Header:
    """What one file says about itself: version, alignment, metadata by key, tensors in file order.

    metadata_end is where the tensor directory begins; the metadata begins at METADATA_START. repaired are the keys of
    texts that are not UTF-8: what could not be decoded is U+FFFD there.
    """

    version: int
    alignment: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]
    metadata_end: int
    repaired: tuple[str, ...] = ()


def parse_header(path: Path, data: mmap.mmap | bytes) -> Header:
    """Read and check the header of one file.

    Args:
        path: named in errors.
        data: the whole file.

    Raises:
        GGUFError: anything in it is malformed.
    """
    return _Parser(path, data).header()


def _quoted(name: str) -> str:
    """Quote a name for an error, cut to a readable length."""
    return repr(name if len(name) <= 80 else name[:77] + "…")


class _Parser:
    """A cursor over untrusted bytes."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.repaired: list[str] = []
        self.key = ""  # whose value is being read

    def fail(self, field: str, found: str, allowed: str) -> NoReturn:
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
        return int.from_bytes(self.data[(start := self.take(4, field)) : start + 4], "little")

    def uint64(self, field: str) -> int:
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
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            if self.repairs():
                return self.data[start : start + length].decode(errors="replace")
            self.fail(field, f"byte {error.object[error.start]:#04x} at offset {start + error.start}", "valid UTF-8")

    def name(self, field: str) -> str:
        length = int.from_bytes(self.data[self.pos : self.pos + 8], "little")
        if self.size - self.pos >= 8 and not 1 <= length <= MAX_NAME_BYTES:
            self.fail(f"{field} length", str(length), f"1 to {MAX_NAME_BYTES} bytes")
        return self.string(field)

    # -- metadata --------------------------------------------------------------------------------------------------

    def value(self, field: str, value_type: int) -> MetadataValue:
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

    # -- the file --------------------------------------------------------------------------------------------------

    def header(self) -> Header:
        version = self.check_magic_and_version()
        n_tensors = self.count("tensor count", MIN_TENSOR)
        n_pairs = self.count("metadata count", MIN_PAIR)
        metadata: dict[str, MetadataValue] = {}
        alignment = DEFAULT_ALIGNMENT
        for i in range(n_pairs):
            key = self.name(f"metadata key {i}")
            field = f"metadata {_quoted(key)}"
            if key in metadata:
                self.fail(field, "a second entry of that key", "each key once")
            value_type = self.uint32(f"{field} type")
            if value_type not in NUMBER_TYPES and value_type not in (STRING, ARRAY):
                self.fail(f"{field} type", str(value_type), "0 to 12")
            self.key = key
            metadata[key] = self.value(field, value_type)
            self.key = ""
            if key == "general.alignment":
                alignment = self.check_alignment(field, value_type, metadata[key])
        metadata_end = self.pos
        tensors: dict[str, TensorInfo] = {}
        for i in range(n_tensors):
            info = self.tensor(i, alignment)
            if info.name in tensors:
                self.fail(f"tensor {_quoted(info.name)}", "a second tensor of that name", "each name once")
            tensors[info.name] = info
        tensors = self.place(tensors, alignment)
        return Header(version, alignment, metadata, tensors, metadata_end, tuple(self.repaired))

    def check_magic_and_version(self) -> int:
        magic = bytes(self.data[:16])
        if magic[:4] != MAGIC:
            hint = next(
                (f" (it looks like {what})" for start, what in _OTHER_FILES if magic.startswith(start)),
                " (this is no GGUF file)",
            )
            if not magic:
                hint = " (the file is empty)"
            elif magic[8:9] == b"{":
                hint = " (it looks like a safetensors file; convert it to GGUF first)"
            self.fail("magic", repr(magic[:4]), f"{MAGIC!r}{hint}")
        self.pos = 4
        version = self.uint32("version")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            self.fail(
                "byte order",
                "a big-endian file",
                "little-endian; write it again with the converter's little-endian setting",
            )
        if version == 1:
            self.fail("version", "1, which used 32-bit counts", "2 or 3; convert the model again")
        if version not in VERSIONS:
            self.fail("version", str(version), "2 or 3")
        return version

    def check_alignment(self, field: str, value_type: int, value: MetadataValue) -> int:
        if value_type != UINT32 or not isinstance(value, int):
            kind = {STRING: "STRING", ARRAY: "ARRAY"}.get(value_type) or NUMBER_TYPES[value_type][0]
            self.fail(f"{field} type", kind, "UINT32")
        if value < 8 or value & (value - 1) or value > MAX_ALIGNMENT:
            self.fail(field, str(value), f"a power of two, 8 to {MAX_ALIGNMENT}")
        return value

    def tensor(self, index: int, alignment: int) -> TensorInfo:
        """One directory entry; offset is still relative to the data section."""
        name = self.name(f"name of tensor {index}")
        field = f"tensor {_quoted(name)}"
        n_dims = self.uint32(f"{field} dimension count")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{field} dimension count", str(n_dims), f"1 to {MAX_DIMS}")
        dims = [self.uint64(f"{field} dimensions") for _ in range(n_dims)]
        type_id = self.uint32(f"{field} type")
        offset = self.uint64(f"{field} offset")
        if type_id in REMOVED_TYPES:
            self.fail(
                f"{field} type",
                f"{type_id}, {REMOVED_TYPES[type_id]}, removed from ggml",
                "a type alive in ggml; quantize the model again",
            )
        try:
            ggml_type = GGMLType(type_id)
        except ValueError:
            self.fail(f"{field} type", str(type_id), f"the ids 0 to {max(GGMLType).value} that ggml knows")
        if 0 in dims:
            self.fail(f"{field} dimensions", str(dims), "at least 1 each")
        if dims[0] % ggml_type.block_size:
            self.fail(f"{field} row length", str(dims[0]), f"a multiple of {ggml_type.block_size} for {ggml_type.name}")
        n_bytes = math.prod(dims) // ggml_type.block_size * ggml_type.type_size
        if n_bytes > self.size:
            self.fail(
                f"{field} dimensions", f"{dims}, {n_bytes} bytes of {ggml_type.name}", f"at most the file's {self.size}"
            )
        if offset % alignment:
            self.fail(f"{field} offset", str(offset), f"a multiple of the alignment {alignment}")
        return TensorInfo(name, ggml_type, tuple(reversed(dims)), n_bytes, offset)

    def place(self, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Check that the tensors are inside the file and do not overlap, and make their offsets absolute."""
        base = -(-self.pos // alignment) * alignment
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if base + info.offset + info.n_bytes > self.size:
                self.fail(
                    f"tensor {_quoted(info.name)} offset",
                    f"{info.offset} with {info.n_bytes} bytes",
                    f"an end within the data section of {max(self.size - base, 0)} bytes (is the file cut short?)",
                )
            if info.offset < end:
                self.fail(
                    f"tensor {_quoted(info.name)} offset",
                    str(info.offset),
                    f"{end} or more, where {_quoted(before)} ends",
                )
            end, before = info.offset + info.n_bytes, info.name
        return {
            name: TensorInfo(name, info.type, info.shape, info.n_bytes, base + info.offset)
            for name, info in tensors.items()
        }
