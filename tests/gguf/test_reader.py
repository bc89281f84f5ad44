"""The GGUF container: what the gguf package writes we read, what is malformed is refused by name."""

import gc
import struct
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.errors import GGUFError, ModelFileError
from engine.gguf import REMOVED_TYPES, GGMLType, open_gguf, row_bytes
from engine.gguf.parse import parse_header
from tests.support.models.gguf_builder import Typed, build_gguf, string, tiny_llama

F32_2X4 = np.arange(8, dtype=np.float32).reshape(2, 4)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(tmp_path: Path, data: bytes) -> str:
    """Open data as a file, expect a refusal that names the file, and return its text."""
    path = write(tmp_path / "bad.gguf", data)
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    text = str(caught.value)
    assert str(path) in text
    assert "found" in text
    assert "allowed" in text
    return text


# -- what the gguf package writes ------------------------------------------------------------------------------------


def test_reads_what_the_gguf_package_writes(tmp_path):
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 64)).astype(np.float32)
    cube = rng.normal(size=(2, 3, 32)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "grün 日本 🙂")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.add_array("strings", ["a", "ü", "日本\0x"])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_tensor("plain", matrix)
    writer.add_tensor("half", matrix.astype(np.float16))
    quantized = gguf.quants.quantize(cube, gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("cube", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("vector", np.arange(5, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with open_gguf(path) as file:
        meta = file.metadata
        assert (file.version, file.alignment, file.parts) == (3, 32, (path,))
        assert file.file_size == path.stat().st_size
        assert meta["general.architecture"] == "llama"
        assert [meta[k] for k in ("u8", "i8", "u16", "i16")] == [255, -128, 65535, -32768]
        assert [meta[k] for k in ("u32", "i32", "u64", "i64")] == [2**32 - 1, -(2**31), 2**64 - 1, -(2**63)]
        assert (meta["f32"], meta["f64"], meta["yes"], meta["no"]) == (0.5, 0.1, True, False)
        assert type(meta["yes"]) is bool
        assert type(meta["u8"]) is int
        assert meta["text"] == "grün 日本 🙂"
        assert meta["strings"] == ["a", "ü", "日本\0x"]
        assert meta["ints"].dtype == np.int32
        assert meta["ints"].tolist() == [1, -2, 3]
        assert meta["floats"].tolist() == [0.5, 1.5]
        assert meta["flags"].tolist() == [True, False]
        assert [part.tolist() for part in meta["nested"]] == [[1, 2], [3]]
        assert list(file.tensors) == ["plain", "half", "cube", "vector"]
        cube_info = file.tensors["cube"]
        assert (cube_info.type, cube_info.shape, cube_info.n_elements) == (GGMLType.Q4_0, (2, 3, 32), 192)
        assert cube_info.n_bytes == 2 * 3 * 18
        assert cube_info.row_bytes == 18
        np.testing.assert_array_equal(file.raw("cube"), quantized)
        np.testing.assert_array_equal(file.raw("plain").view(np.float32), matrix)
        np.testing.assert_array_equal(file.raw("half").view(np.float16), matrix.astype(np.float16))
        np.testing.assert_array_equal(file.raw("vector").view(np.int32), np.arange(5))


def test_the_gguf_package_reads_what_the_builder_writes(tmp_path):
    path = write(tmp_path / "a.gguf", tiny_llama(weight_type=GGMLType.Q4_0, ffn=96))
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert tuple(reversed(tensor.shape.tolist())) == info.shape
            assert (tensor.tensor_type, tensor.n_bytes, tensor.data_offset) == (info.type, info.n_bytes, info.offset)
            np.testing.assert_array_equal(tensor.data.view(np.uint8), ours.raw(tensor.name))
        keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
        assert keys == list(ours.metadata)
        for key in keys:
            found = ours.metadata[key]
            assert theirs.fields[key].contents() == (found.tolist() if isinstance(found, np.ndarray) else found)


def test_sizes_and_names_are_ggmls():
    for theirs, (block_size, type_size) in gguf.GGML_QUANT_SIZES.items():
        ours = GGMLType(int(theirs))
        assert (ours.name, ours.block_size, ours.type_size) == (theirs.name, block_size, type_size)
    assert not set(REMOVED_TYPES) & set(GGMLType)
    assert set(REMOVED_TYPES) | {int(t) for t in GGMLType} == set(range(43))
    assert row_bytes(GGMLType.Q6_K, 512) == 420
    with pytest.raises(ValueError, match="whole Q6_K blocks of 256"):
        row_bytes(GGMLType.Q6_K, 300)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_versions_and_alignment(tmp_path, version, alignment):
    tensors = {"a": F32_2X4, "b": np.ones(3, np.float32), "c": F32_2X4[:1]}
    path = write(tmp_path / "a.gguf", build_gguf({"k": 1}, tensors, version=version, alignment=alignment))
    with open_gguf(path) as file:
        assert (file.version, file.alignment) == (version, alignment)
        for name, array in tensors.items():
            assert file.tensors[name].offset % alignment == 0
            np.testing.assert_array_equal(file.raw(name).view(np.float32), array)


def test_a_file_of_metadata_alone(tmp_path):
    deep: list = ["x"]
    for _ in range(7):
        deep = [deep]
    metadata = {"empty": [], "none": np.zeros(0, np.float32), "deep": deep, "": 1}
    del metadata[""]
    with open_gguf(write(tmp_path / "a.gguf", build_gguf(metadata, {}))) as file:
        assert file.metadata["empty"] == []
        assert file.metadata["none"].shape == (0,)
        assert file.metadata["deep"] == deep
        assert file.tensors == {}


def test_no_padding_is_needed_after_the_last_tensor(tmp_path):
    data = build_gguf({}, {"a": np.ones(3, np.float32)})
    padding = 32 - 12
    with open_gguf(write(tmp_path / "a.gguf", data[:-padding])) as file:
        assert file.raw("a").view(np.float32).tolist() == [1, 1, 1]
    assert "tensor 'a' offset" in refused(tmp_path, data[: -padding - 1])


# -- life of the mapping ---------------------------------------------------------------------------------------------


def test_views_are_read_only_and_share_the_mapping(tmp_path):
    with open_gguf(write(tmp_path / "a.gguf", build_gguf({}, {"a": F32_2X4}))) as file:
        one, two = file.raw("a"), file.raw("a")
        assert np.shares_memory(one, two)
        with pytest.raises(ValueError, match="read-only"):
            one[0] = 0


def test_views_outlive_the_file(tmp_path):
    file = open_gguf(write(tmp_path / "a.gguf", build_gguf({"k": 7}, {"a": F32_2X4})))
    view = file.raw("a")
    mapping = weakref.ref(file._parts[0].data)
    file.close()
    file.close()
    np.testing.assert_array_equal(view.view(np.float32), F32_2X4)
    assert file.metadata["k"] == 7
    with pytest.raises(GGUFError, match="closed"):
        file.raw("a")
    assert mapping() is not None
    del view
    gc.collect()
    assert mapping() is None


def test_closing_gives_the_memory_back_although_views_live(tmp_path):
    path = write(tmp_path / "a.gguf", build_gguf({}, {"t": np.ones(1 << 20, np.float32)}))

    def resident() -> int:
        """Kilobytes of the file in this process."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(
            int(next(line for line in lines if line.startswith("Rss:")).split()[1])
            for line in lines
            if line.endswith(str(path))
        )

    with open_gguf(path) as file:
        view = file.raw("t")
        assert view.max() > 0
        assert resident() >= 4096
    assert resident() == 0
    assert view[:4].view(np.float32)[0] == 1  # and it can be read all the same


def test_a_file_cut_short_after_opening_is_noticed(tmp_path):
    path = write(tmp_path / "a.gguf", build_gguf({}, {"a": F32_2X4}))
    with open_gguf(path) as file:
        path.write_bytes(b"")
        with pytest.raises(GGUFError, match="as when it was opened"):
            file.raw("a")


def test_unknown_tensor(tmp_path):
    with (
        open_gguf(write(tmp_path / "a.gguf", build_gguf({}, {"a": F32_2X4}))) as file,
        pytest.raises(GGUFError, match="'nope'"),
    ):
        file.raw("nope")


# -- split files -----------------------------------------------------------------------------------------------------


def write_split(folder: Path, n_parts: int = 3, **change) -> list[Path]:
    """Write a split model; change overrides metadata of the second part, names, or the total."""
    paths = []
    for i in range(n_parts):
        metadata = {"split.no": Typed("u16", i), "split.count": Typed("u16", n_parts)}
        metadata["split.tensors.count"] = Typed("i32", change.get("total", 2 * n_parts))
        if i == 0:
            metadata["general.architecture"] = "llama"
        if i == 1:
            metadata |= change.get("metadata", {})
        tensors = {f"t{2 * i}": F32_2X4 + i, f"t{2 * i + 1}": F32_2X4 - i}
        if i == 1:
            tensors |= change.get("tensors", {})
        path = folder / f"big-{i + 1:05d}-of-{n_parts:05d}.gguf"
        path.write_bytes(build_gguf(metadata, tensors))
        paths.append(path)
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_all(tmp_path, given):
    paths = write_split(tmp_path)
    with open_gguf(paths[given]) as file:
        assert file.path == paths[given]
        assert file.parts == tuple(paths)
        assert file.metadata["general.architecture"] == "llama"
        assert file.file_size == sum(path.stat().st_size for path in paths)
        assert [info.part for info in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        for i in range(3):
            np.testing.assert_array_equal(file.raw(f"t{2 * i}").view(np.float32), F32_2X4 + i)
            np.testing.assert_array_equal(file.raw(f"t{2 * i + 1}").view(np.float32), F32_2X4 - i)


def test_split_by_the_gguf_package(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", F32_2X4 + i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) == 3
    with open_gguf(paths[1]) as file:
        assert file.parts == tuple(paths)
        for i in range(5):
            np.testing.assert_array_equal(file.raw(f"t{i}").view(np.float32), F32_2X4 + i)


def test_split_faults(tmp_path):
    def fault(match, **change):
        paths = write_split(tmp_path, **change)
        with pytest.raises(GGUFError, match=match):
            open_gguf(paths[0])
        return paths

    fault("'split.tensors.count': found 7; allowed: 6", total=7)
    fault("'split.no': found 5; allowed: 1", metadata={"split.no": Typed("u16", 5)})
    fault("'split.count': found 9; allowed: 3", metadata={"split.count": Typed("u16", 9)})
    fault("tensor 't0': found also in", tensors={"t0": F32_2X4})
    paths = write_split(tmp_path)
    paths[2].unlink()
    with pytest.raises(GGUFError, match=r"found 2 of 3; put big-00003-of-00003\.gguf next to it"):
        open_gguf(paths[0])
    with pytest.raises(GGUFError, match=r"allowed: NAME-00001-of-00003\.gguf"):
        open_gguf(paths[0].rename(tmp_path / "other.gguf"))
    with pytest.raises(GGUFError, match=r"'split\.no': found 1; allowed: 0"):
        open_gguf(paths[1].rename(tmp_path / "big-00001-of-00003.gguf"))


@pytest.mark.parametrize("count", ["3", -1, 0.5, [1, 2], Typed("u32", 10**6)])
def test_absurd_split_count(tmp_path, count):
    assert "'split.count'" in refused(tmp_path, build_gguf({"split.count": count}, {}))


# -- not a GGUF file at all ------------------------------------------------------------------------------------------


def test_missing_directory_and_pipe(tmp_path):
    import os

    with pytest.raises(ModelFileError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="found a directory; allowed"):
        open_gguf(tmp_path)
    for name in ("b.gguf", "a.gguf", "c.txt", "d.gguf", "e.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(GGUFError, match=r"directory with a\.gguf, b\.gguf, d\.gguf \.\.\.; allowed"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="pipe"):
        open_gguf(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="cannot be opened"):
        open_gguf("nul\0byte")


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"", "empty"),
        (b"G", "magic"),
        (b"PK\x03\x04", "zip"),
        (b"tjgg", "GGJT"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs", "Git LFS"),
        (b"\x40\0\0\0\0\0\0\0{", "safetensors"),
    ],
)
def test_other_files(tmp_path, start, hint):
    assert hint in refused(tmp_path, start + bytes(100 if len(start) > 1 else 0))


def test_versions_refused_by_name(tmp_path):
    good = build_gguf({}, {"a": F32_2X4})
    assert "big-endian" in refused(tmp_path, b"GGUF" + struct.pack(">I", 3) + good[8:])
    assert "version: found 1, " in refused(tmp_path, b"GGUF" + struct.pack("<I", 1) + good[8:])
    for version in (0, 4, 2**31):
        assert f"version: found {version};" in refused(tmp_path, b"GGUF" + struct.pack("<I", version) + good[8:])


# -- malformed headers: one fault each -------------------------------------------------------------------------------


def header(n_tensors: int, n_pairs: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + body


def pair(key: bytes, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def entry(
    name: bytes = b"t", dims: tuple[int, ...] = (4,), type_id: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type_id, offset)


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 10**6])
def test_huge_counts(tmp_path, count):
    assert f"tensor count: found {count}; allowed: 0 to " in refused(tmp_path, header(count, 0, bytes(64)))
    assert f"metadata count: found {count}; allowed: 0 to " in refused(tmp_path, header(0, count, bytes(64)))
    for element in (0, 8, 9, 12):
        body = pair(b"k", 9, struct.pack("<IQ", element, count)) + bytes(64)
        assert f"metadata 'k' count: found {count};" in refused(tmp_path, header(0, 1, body))
    body = pair(b"k", 8, struct.pack("<Q", count) + bytes(64))
    assert f"metadata 'k': found {count} bytes at offset" in refused(tmp_path, header(0, 1, body))
    body = pair(b"k", 9, struct.pack("<IQ", 8, 3) + string("ab") + struct.pack("<Q", count) + bytes(64))
    assert f"metadata 'k'[1]: found {count} bytes at offset" in refused(tmp_path, header(0, 1, body))
    body = struct.pack("<Q", count) + bytes(64)
    assert f"metadata key 0 length: found {count};" in refused(tmp_path, header(0, 1, body))
    assert f"name of tensor 0 length: found {count};" in refused(tmp_path, header(1, 0, body))


METADATA_FAULTS = {
    "type 13": (pair(b"k", 13, bytes(16)), "metadata 'k' type: found 13; allowed: 0 to 12"),
    "element type 99": (pair(b"k", 9, struct.pack("<IQ", 99, 0)), "'k' element type: found 99"),
    "bool 2": (pair(b"k", 7, b"\x02"), "'k': found byte 2 as a BOOL; allowed: 0 or 1"),
    "bool array": (pair(b"k", 9, struct.pack("<IQ", 7, 3) + b"\0\1\3"), "found byte 3 as a BOOL"),
    "empty key": (pair(b"", 0, bytes(16)), "metadata key 0 length: found 0; allowed: 1 to 65535"),
    "key not UTF-8": (pair(b"k\xff", 0, b"\0"), "metadata key 0: found byte 0xff at offset 33; allowed: valid UTF-8"),
    "text not UTF-8": (
        pair(b"general.architecture", 8, string(b"ab\xc3(")),
        "metadata 'general.architecture': found byte 0xc3",
    ),
    "surrogate": (
        pair(b"tokenizer.ggml.pre", 8, string(b"\xed\xa0\x80")),
        "metadata 'tokenizer.ggml.pre': found byte 0xed",
    ),
    "array not UTF-8": (
        pair(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + string(b"ok") + string(b"a\x80")),
        "metadata 'tokenizer.ggml.tokens'[1]: found byte 0x80",
    ),
    "value cut off": (pair(b"k", 10, b"\0\0\0\0"), "metadata 'k': found 8 bytes at offset"),
    "nesting": (pair(b"k", 9, struct.pack("<IQ", 9, 1) * 50), "nested deeper than 8"),
    "alignment 0": (pair(b"general.alignment", 4, struct.pack("<I", 0)), "found 0; allowed: a power of two"),
    "alignment 24": (pair(b"general.alignment", 4, struct.pack("<I", 24)), "found 24; allowed: a power of two"),
    "alignment 2": (pair(b"general.alignment", 4, struct.pack("<I", 2)), "found 2; allowed: a power of two, 8 to"),
    "alignment 2^31": (pair(b"general.alignment", 4, struct.pack("<I", 2**31)), "found 2147483648; allowed"),
    "alignment float": (pair(b"general.alignment", 6, struct.pack("<f", 32)), "found FLOAT32; allowed: UINT32"),
    "alignment text": (pair(b"general.alignment", 8, string("32")), "found STRING; allowed: UINT32"),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_metadata_faults(tmp_path, fault):
    body, expected = METADATA_FAULTS[fault]
    assert expected in refused(tmp_path, header(0, 1, body))


def test_descriptions_that_are_not_utf_8(tmp_path, caplog):
    """Latin-1, as some writers use it: replaced, named in one warning, and what follows is read as usual."""
    latin = "Aurélie".encode("latin-1")
    texts = struct.pack("<IQ", 8, 3) + string(b"ok") + string(latin) + string(b"a\x80")
    body = pair(b"general.name", 8, string(latin)) + pair(b"general.tags", 9, texts)
    body += pair(b"quantize.imatrix.file", 9, struct.pack("<IQ", 9, 1) + texts) + pair(b"k", 8, string("Ä"))
    path = tmp_path / "latin.gguf"
    path.write_bytes(header(0, 4, body))
    with open_gguf(path) as file:
        tags = ["ok", "Aur\ufffdlie", "a\ufffd"]
        assert file.metadata == {
            "general.name": "Aur\ufffdlie",
            "general.tags": tags,
            "quantize.imatrix.file": [tags],
            "k": "Ä",
        }
    (record,) = caplog.records
    assert "general.name, general.tags, quantize.imatrix.file:" in record.getMessage()


def test_duplicate_key(tmp_path):
    body = pair(b"k", 0, b"\1") * 2
    assert "metadata 'k': found a second entry of that key" in refused(tmp_path, header(0, 2, body))


TENSOR_FAULTS = {
    "no dimensions": (entry(dims=(), n_dims=0), "dimension count: found 0; allowed: 1 to 4"),
    "five dimensions": (entry(dims=(1,) * 5), "dimension count: found 5"),
    "4 billion dimensions": (entry(n_dims=2**32 - 1), "dimension count: found 4294967295"),
    "zero dimension": (entry(dims=(4, 0)), "dimensions: found [4, 0]; allowed: at least 1 each"),
    "overflow to 0": (entry(dims=(2**32, 2**32)), "dimensions: found [4294967296, 4294967296], "),
    "overflow to 4": (entry(dims=(2**62 + 1, 4)), "bytes of F32; allowed: at most the file's"),
    "half a block": (entry(dims=(48,), type_id=2), "row length: found 48; allowed: a multiple of 32 for Q4_0"),
    "rows not blocks": (entry(dims=(16, 2), type_id=8), "row length: found 16; allowed: a multiple of 32 for Q8_0"),
    "unaligned": (entry(offset=4), "offset: found 4; allowed: a multiple of the alignment 32"),
    "beyond the end": (entry(offset=1 << 20), "offset: found 1048576 with 16 bytes"),
    "offset near 2^64": (entry(offset=2**64 - 32), f"offset: found {2**64 - 32} with 16 bytes"),
    "longer than the data": (entry(dims=(40,)), "tensor 't' offset: found 0 with 160 bytes"),
    "type 43": (entry(type_id=43), "type: found 43; allowed: the ids 0 to 42"),
    "type 2^32 - 1": (entry(type_id=2**32 - 1), "type: found 4294967295"),
    "empty name": (entry(name=b""), "name of tensor 0 length: found 0"),
    "name not UTF-8": (entry(name=b"\xfe"), "name of tensor 0: found byte 0xfe"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensor_faults(tmp_path, fault):
    body, expected = TENSOR_FAULTS[fault]
    data = header(1, 0, body)
    assert expected in refused(tmp_path, data + bytes(-len(data) % 32 + 128))


@pytest.mark.parametrize("ggml_type", [t for t in GGMLType if t.block_size > 1], ids=lambda t: t.name)
def test_rows_that_are_no_whole_blocks(tmp_path, ggml_type):
    """No type allows them, not even where the tensor as a whole is a number of blocks."""
    length = ggml_type.block_size // 2
    data = header(1, 0, entry(dims=(length, 4), type_id=ggml_type))
    expected = f"row length: found {length}; allowed: a multiple of {ggml_type.block_size} for {ggml_type.name}"
    assert expected in refused(tmp_path, data + bytes(1024))


@pytest.mark.parametrize("type_id", REMOVED_TYPES)
def test_removed_types_are_refused_by_name(tmp_path, type_id):
    text = refused(tmp_path, header(1, 0, entry(dims=(256,), type_id=type_id)) + bytes(4096))
    assert f"type: found {type_id}, {REMOVED_TYPES[type_id]}, removed" in text


@pytest.mark.parametrize("ggml_type", list(GGMLType))
def test_every_living_type_is_listed(tmp_path, ggml_type):
    raw = np.zeros((2, row_bytes(ggml_type, 256)), np.uint8)
    with open_gguf(write(tmp_path / "a.gguf", build_gguf({}, {"a": (raw, (2, 256), ggml_type)}))) as file:
        assert file.tensors["a"].type is ggml_type
        assert file.raw("a").shape == raw.shape


def test_duplicate_and_overlapping_tensors(tmp_path):
    both = header(2, 0, entry(b"a") + entry(b"a", offset=32))
    assert "tensor 'a': found a second tensor of that name" in refused(tmp_path, both + bytes(256))
    overlap = header(2, 0, entry(b"a", dims=(9,), offset=0) + entry(b"b", offset=32))
    assert "tensor 'b' offset: found 32; allowed: 36 or more, where 'a' ends" in refused(tmp_path, overlap + bytes(256))
    same = header(2, 0, entry(b"b", offset=64) + entry(b"a", offset=64))
    assert "where 'b' ends" in refused(tmp_path, same + bytes(256))
    apart = header(2, 0, entry(b"b", offset=64) + entry(b"a", offset=0))
    with open_gguf(write(tmp_path / "ok.gguf", apart + bytes(256))) as file:
        assert list(file.tensors) == ["b", "a"]


def test_every_truncation_is_refused():
    data = build_gguf({"k": 1, "list": ["a", "bc"], "n": np.arange(3)}, {"a": np.ones(8, np.float32)})
    parse_header(Path("x"), data)
    for length in range(len(data)):
        with pytest.raises(GGUFError):
            parse_header(Path("x"), data[:length])


def test_long_names_are_cut_in_errors(tmp_path):
    assert len(refused(tmp_path, header(0, 1, pair(b"k" * 60000, 13, b"")))) < 600


# -- speed -----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_128k(tmp_path):
    rng = np.random.default_rng(0)
    tokens = [f"Ġtok{i:x}" for i in rng.integers(0, 2**40, 128_256)]
    merges = [f"Ġto{i:x} ab" for i in rng.integers(0, 2**20, 280_000)]
    metadata = {"t.tokens": tokens, "t.merges": merges, "t.types": np.ones(len(tokens), np.int32)}
    path = write(tmp_path / "vocab.gguf", build_gguf(metadata, {}))
    with open_gguf(path) as file:
        pass
    assert file.metadata["t.tokens"] == tokens
    assert file.metadata["t.merges"] == merges


@pytest.mark.shared
def test_real_vocabularies_equal_the_gguf_package(shared_path):
    path = shared_path("vocabs/ggml-vocab-gpt-2.gguf")
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        for key, found in ours.metadata.items():
            assert theirs.fields[key].contents() == (found.tolist() if isinstance(found, np.ndarray) else found)
