"""One GGUF file's header: metadata and tensor directory, read from an untrusted byte buffer (cursor.py).

Every offset is checked against the size of the buffer. Independent of mapping, of split files and of models.
Format: the GGUF document in ggml's docs/gguf.md (little-endian, versions 2 and 3).
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

from engine.gguf.cursor import ARRAY, MIN_STRING, NUMBER_TYPES, STRING, UINT32, Cursor, MetadataValue
from engine.gguf.types import REMOVED_TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 30
MAX_DIMS = 4
METADATA_START = 24
"""After magic, version and the counts of tensors and of metadata."""

# The fewest bytes each can take: what a count is checked against before anything is read.
MIN_PAIR = MIN_STRING + 1 + 4 + 1
MIN_TENSOR = MIN_STRING + 1 + 4 + 8 + 4 + 8

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
    return _Header(path, data).read()


def _quoted(name: str) -> str:
    """Quote a name for an error, cut to a readable length."""
    return repr(name if len(name) <= 80 else name[:77] + "…")


class _Header(Cursor):
    """Reads the header in file order: magic, version, metadata, tensor directory."""

    def read(self) -> Header:
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
            self.fail(f"{field} type", str(type_id), f"the ids 0 to {max(GGMLType).value} of ggml's types")
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
