"""Damaged files: whatever the bytes, the reader soon raises a GGUFError or gives a file that can be read."""

import struct
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.errors import GGUFError
from engine.gguf import GGMLType, open_gguf
from engine.gguf.parse import parse_header
from tests.support.models.gguf_builder import SCALARS, Typed, build_gguf, string, tiny_llama

ANY_VALUE = [0, 1, 2, 3, 8, 9, 12, 13, 31, 32, 255, 65536, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1]


@cache
def bases() -> tuple[bytes, ...]:
    """Valid files with every value type, nesting, odd shapes, and many tensors."""
    scalars = {kind: Typed(kind, 1) for kind in SCALARS}
    arrays = {
        "nested": [[["a", "b"], ["ü"]], [["日本"]]],
        "numbers": [np.arange(5), np.arange(2)],
        "flags": np.array([True, False]),
        "strings": ["token"] * 40,
        "empty": [],
        "text": "hello",
    }
    raw = np.zeros((2, 3, 18), np.uint8)
    odd = {"q": (raw, (2, 3, 32), GGMLType.Q4_0), "v": np.ones(3, np.float32), "x": np.ones((1, 1, 2, 2), np.float32)}
    return (
        build_gguf(scalars | arrays, odd),
        build_gguf(scalars, odd, version=2, alignment=64),
        build_gguf({}, {f"t{i}": np.ones(i + 1, np.float32) for i in range(20)}),
        tiny_llama(n_layers=1, width=32, ffn=32, heads=2, kv_heads=1),
    )


@st.composite
def damaged(draw) -> bytes:
    """A valid file after one to four mutations, most of them in the header, where the structure is."""
    data = bytearray(draw(st.sampled_from(bases())))
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        if size < 16:
            break
        at = draw(st.one_of(st.integers(0, min(size, 1200) - 1), st.integers(0, size - 1)))
        match draw(st.sampled_from(["truncate", "flip", "byte", "word", "long", "splice", "delete", "insert", "swap"])):
            case "truncate":
                del data[at:]
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                data[at] = draw(st.integers(0, 255))
            case "word":
                data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(ANY_VALUE)) & 0xFFFFFFFF)
            case "long":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(ANY_VALUE)))
            case "splice":
                other = draw(st.sampled_from(bases()))
                start = draw(st.integers(0, len(other) - 1))
                length = draw(st.integers(1, 200))
                data[at : at + length] = other[start : start + length]
            case "delete":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "swap":
                length = draw(st.integers(1, 64))
                to = draw(st.integers(0, size - 1))
                data[at : at + length], data[to : to + length] = data[to : to + length], data[at : at + length]
    return bytes(data)


def check(data: bytes) -> None:
    """Parse; anything but GGUFError fails the test. What is accepted must hold together."""
    try:
        header = parse_header(Path("fuzz.gguf"), data)
    except GGUFError as error:
        text = str(error)
        assert text.startswith("fuzz.gguf: ")
        assert "found" in text
        assert "allowed" in text
        return
    end = 0
    for info in sorted(header.tensors.values(), key=lambda info: info.offset):
        assert 1 <= len(info.shape) <= 4
        assert min(info.shape) >= 1
        assert info.offset % header.alignment == 0
        assert info.offset >= end
        assert info.n_bytes == info.n_elements // info.type.block_size * info.type.type_size
        end = info.offset + info.n_bytes
        np.frombuffer(data, np.uint8, info.n_bytes, info.offset)
    assert end <= len(data)


@settings(max_examples=2500, deadline=1000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_mutations(data):
    check(data)


@settings(max_examples=500, deadline=1000, derandomize=True)
@given(st.binary(max_size=300))
@example(b"")
def test_noise_behind_a_valid_start(data):
    check(data)
    check(b"GGUF\3\0\0\0" + data)
    check(b"GGUF\3\0\0\0" + struct.pack("<QQ", 1, 1) + data)


def test_every_bit_of_the_header_flipped():
    data = bases()[2]
    for bit in range(8 * 600):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        check(bytes(damaged))


def test_every_field_made_absurd():
    data = bases()[0]
    for at in range(4, 900):
        for value in (2**31, 2**63, 2**64 - 1):
            check(data[:at] + struct.pack("<Q", value) + data[at + 8 :])


def test_memory_is_bounded_by_the_file():
    """Files made to cost the most per byte: empty strings, empty nested arrays, tiny keys, short strings."""
    n = 4_000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    costly = {
        "empty strings": head + struct.pack("<IQ", 8, n) + bytes(8 * n),
        "short strings": head + struct.pack("<IQ", 8, n) + (struct.pack("<Q", 3) + "日".encode()) * n,
        "empty arrays": head + struct.pack("<IQ", 9, n) + bytes(12 * n),
        "lists": head + struct.pack("<IQ", 9, n) + struct.pack("<IQ", 8, 0) * n,
        "tiny arrays": head + struct.pack("<IQ", 9, n) + (struct.pack("<IQ", 0, 1) + b"\1") * n,
        "keys": b"GGUF"
        + struct.pack("<IQQ", 3, 0, n)
        + b"".join(struct.pack("<Q4sIB", 4, b"%04x" % i, 0, 1) for i in range(n)),
        "tensors": b"GGUF"
        + struct.pack("<IQQ", 3, n, 0)
        + b"".join(struct.pack("<Q4sIQIQ", 4, b"%04x" % i, 1, 1, 24, 32 * i) for i in range(n))
        + bytes(32 * n),
    }
    for name, data in costly.items():
        tracemalloc.start()
        check(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * len(data), name


def test_damaged_files_on_disk(tmp_path):
    """The same through the mapping: a few hundred files, opened, read and closed."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.gguf"
    opened = 0
    for i in range(300):
        data = bytearray(bases()[i % 4])
        for at in rng.integers(0, min(len(data), 2000), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(0, len(data))] if i % 3 == 0 else data)
        try:
            with open_gguf(path) as file:
                opened += 1
                for name in file.tensors:
                    file.raw(name).sum()
        except GGUFError as error:
            assert str(path) in str(error)  # noqa: PT017 - most files are refused, some are not
    assert opened > 20


def test_many_empty_arrays_cost_no_more_than_their_list():
    body = struct.pack("<IQ", 4, 0) * 30_000  # each an empty array of UINT32
    data = build_gguf({"k": 1}, {})
    pair = string("k") + struct.pack("<IIQ", 9, 9, 30_000) + body
    data = data[: 4 + 4 + 8 + 8] + pair
    tracemalloc.start()
    header = parse_header(Path("x.gguf"), data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(header.metadata["k"]) == 30_000
    assert peak < 2 * len(data)
