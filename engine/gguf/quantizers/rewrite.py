"""A GGUF file written again with other tensor types: all metadata as it is, tensors packed anew.

One tensor is in memory at a time. The numbers come from quantize.py.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.errors import GGUFError
from engine.gguf.parse import MAGIC, TensorInfo
from engine.gguf.quantizers.quantize import WRITABLE, quantize
from engine.gguf.quants import dequantize
from engine.gguf.reader import GGUFFile
from engine.gguf.types import GGMLType, row_bytes

CHUNK_BYTES = 64 << 20
"""Floats that are packed at a time."""

_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40,
}  # fmt: skip
"""What general.file_type says of files that are mostly of one type, by its name."""

_UNKNOWN_FILE_TYPE = 1024
"""The same for types that have no such number: to be guessed from the tensors."""


def matrices(source: GGUFFile) -> list[TensorInfo]:
    """Tensors that quantizers pack: matrices and stacks of them, but not those that choose experts or mix streams.

    Vectors with further dimensions of 1 are no matrices, nor are the few that RWKV mixes tokens with.
    """
    small = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "time_mix_first.weight")
    within = ("altup_", "laurel_", "_mix_lerp_")
    return [
        info
        for info in source.tensors.values()
        if sum(size > 1 for size in info.shape) > 1
        and not info.name.endswith(small)
        and not any(part in info.name for part in within)
    ]


def rewrite(source: GGUFFile, target: str | os.PathLike[str], types: Mapping[str, GGMLType]) -> None:
    """Write a file whose tensors have other types.

    Args:
        source: an open file.
        target: path to write; appears there when it is complete.
        types: new types by tensor name; what is not named stays as it is, byte for byte.

    Raises:
        GGUFError: the source is one part of several, a tensor is unknown, or its rows are no whole blocks of its type.
        OSError: the target cannot be written.
    """
    if len(source.parts) > 1:
        raise GGUFError(f"{source.path}: is split into {len(source.parts)} files; merge them into one first")
    _check(source, types)
    infos = list(source.tensors.values())
    block = _with_file_type(source.metadata_block(), types)
    head = MAGIC + struct.pack("<IQQ", source.version, len(infos), len(source.metadata)) + block
    align, offset = source.alignment, 0
    for info in infos:
        new = types.get(info.name, info.type)
        name = info.name.encode()
        head += struct.pack("<Q", len(name)) + name
        head += struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        head += struct.pack("<IQ", new, offset)
        n_bytes = info.n_elements // new.block_size * new.type_size
        offset += n_bytes + -n_bytes % align
    target = Path(target)
    unfinished = target.with_name(target.name + ".part")
    try:
        with open(unfinished, "wb") as out:
            out.write(head + bytes(-len(head) % align))
            for info in infos:
                out.writelines(_packed(source, info, types.get(info.name, info.type)))
                out.write(bytes(-out.tell() % align))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _packed(source: GGUFFile, info: TensorInfo, new: GGMLType) -> Iterator[memoryview]:
    raw = source.raw(info.name).reshape(-1, info.row_bytes)
    step = max(1, CHUNK_BYTES // (4 * info.shape[-1]))
    for start in range(0, len(raw), step):
        rows = raw[start : start + step]
        yield (rows if new is info.type else quantize(dequantize(rows, info.type), new)).data


def _check(source: GGUFFile, types: Mapping[str, GGMLType]) -> None:
    for name, new in types.items():
        info = source.tensors.get(name)
        if info is None:
            raise GGUFError(f"{source.path}: tensor {name!r}: not found; allowed: tensors of the file")
        if new not in WRITABLE and new is not info.type:
            raise GGUFError(f"{new.name} cannot be written; allowed: {', '.join(kind.name for kind in WRITABLE)}")
        try:
            row_bytes(new, info.shape[-1])
        except ValueError as error:
            raise GGUFError(f"{source.path}: tensor {name!r}: {error}; leave it or choose another type") from error


def _with_file_type(block: bytes, types: Mapping[str, GGMLType]) -> bytes:
    """Metadata with general.file_type set to the type of most tensors; as it is where the file has no such key."""
    key = b"general.file_type"
    start = struct.pack("<Q", len(key)) + key + struct.pack("<I", 4)
    at = block.find(start)
    if at < 0 or not types:
        return block
    names = [kind.name for kind in types.values()]
    number = _FILE_TYPES.get(max(set(names), key=names.count), _UNKNOWN_FILE_TYPE)
    value = at + len(start)
    return block[:value] + struct.pack("<I", number) + block[value + 4 :]
