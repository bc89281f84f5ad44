"""Dequantization, bit for bit against the gguf package."""

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest
from gguf_builder import random_blocks

from engine.gguf import FORMATS, GGMLType, dequantize
from engine.gguf.block_format import BlockFormat

# Scales of every kind: zeros, smallest and largest subnormal, smallest normal, one, largest, infinities, NaNs.
EDGE_HALVES = np.frombuffer(
    bytes.fromhex("0000 8000 0001 8001 03FF 83FF 0400 3C00 BC00 7BFF FBFF 7C00 FC00 7E00 7C01 FE00"), ">u2"
).astype(np.uint16)
EDGE_BYTES = np.array([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, 0x55, 0xAA], np.uint8)


def reference(raw: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """What the gguf package (for F64, which it leaves out, numpy) makes of packed rows."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if ggml_type is GGMLType.F64:
            return raw.view("<f8").astype(np.float32)
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(ggml_type)))


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    both_nan = np.isnan(found) & np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[~both_nan], expected.view(np.uint32)[~both_nan])


def half_fields(fmt: type[BlockFormat]) -> list[str]:
    assert fmt.layout.names is not None
    return [name for name in fmt.layout.names if fmt.layout[name] == np.float16]


formats = pytest.mark.parametrize("ggml_type", list(FORMATS), ids=lambda t: t.name)


def test_the_formats_of_the_first_release():
    names = "F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K F64 BF16"
    assert set(names.split()) <= {t.name for t in FORMATS}
    for ggml_type, fmt in FORMATS.items():
        assert (fmt.type, fmt.block_size, fmt.type_size) == (ggml_type, ggml_type.block_size, ggml_type.type_size)


@formats
def test_random_blocks(ggml_type):
    rng = np.random.default_rng(int(ggml_type))
    raw = rng.integers(0, 256, (64, 16 * ggml_type.type_size), dtype=np.uint8)
    assert_same_bits(FORMATS[ggml_type].dequantize(raw), reference(raw, ggml_type))


@formats
def test_edge_scales_with_edge_and_random_contents(ggml_type):
    fmt = FORMATS[ggml_type]
    rng = np.random.default_rng(1)
    halves = half_fields(fmt)
    n = len(EDGE_HALVES) ** 2
    raw = rng.integers(0, 256, (n * (len(EDGE_BYTES) + 1), fmt.type_size), dtype=np.uint8)
    raw[n:] = np.repeat(EDGE_BYTES, n)[:, None]
    blocks = raw.reshape(-1).view(fmt.layout)
    pairs = np.stack(np.meshgrid(EDGE_HALVES, EDGE_HALVES), -1).reshape(-1, 2)
    for column, name in enumerate(halves):
        blocks[name] = np.tile(pairs[:, column], len(EDGE_BYTES) + 1).view(np.float16)
    assert_same_bits(fmt.dequantize(raw), reference(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", [GGMLType.F16, GGMLType.BF16], ids=lambda t: t.name)
def test_every_16_bit_number(ggml_type):
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    assert_same_bits(dequantize(raw, ggml_type), reference(raw, ggml_type))


@formats
def test_every_value_of_every_byte(ggml_type):
    """One byte of a block at a time through all 256 values, the rest fixed and all scales 1."""
    fmt = FORMATS[ggml_type]
    raw = np.full((fmt.type_size, 256, fmt.type_size), 0xA5, np.uint8)
    for name in half_fields(fmt):
        raw.reshape(-1).view(fmt.layout)[name] = 1
    for byte in range(fmt.type_size):
        raw[byte, :, byte] = np.arange(256)
    assert_same_bits(fmt.dequantize(raw), reference(raw, ggml_type))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_by_the_gguf_package(name):
    x = np.random.default_rng(2).normal(size=(8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    found = dequantize(raw, GGMLType[name])
    assert_same_bits(found, reference(raw, GGMLType[name]))
    assert np.abs(found - x).max() < {"4": 0.3, "5": 0.15, "8": 0.02}[name[1]]


@formats
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (0, 3)])
def test_any_leading_shape(ggml_type, shape):
    fmt = FORMATS[ggml_type]
    raw = random_blocks((*shape, 2 * 256), ggml_type)
    found = fmt.dequantize(raw)
    assert found.shape == (*shape, 512)
    if raw.size:  # the package has no answer for no rows
        assert_same_bits(found.reshape(-1, 512), reference(raw.reshape(-1, raw.shape[-1]), ggml_type))


@formats
def test_strided_and_read_only_rows(ggml_type):
    raw = random_blocks((6, 256), ggml_type)
    raw.flags.writeable = False
    expected = dequantize(raw, ggml_type)
    assert_same_bits(dequantize(raw[::2], ggml_type), expected[::2])
    assert_same_bits(dequantize(raw[::-1], ggml_type), expected[::-1])
    shifted = np.zeros(raw.size + 1, np.uint8)  # an address that is no multiple of any number's size
    shifted[1:] = raw.reshape(-1)
    assert_same_bits(dequantize(shifted[1:].reshape(raw.shape), ggml_type), expected)
    assert dequantize(raw, ggml_type).flags.writeable


@formats
def test_the_result_never_aliases_the_file(ggml_type):
    raw = random_blocks((2, 256), ggml_type)
    assert not np.shares_memory(dequantize(raw, ggml_type), raw)


@formats
def test_memory_is_a_few_times_the_result(ggml_type):
    raw = random_blocks((256, 1024), ggml_type)
    dequantize(raw, ggml_type)
    tracemalloc.start()
    out = dequantize(raw, ggml_type)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.6 * out.nbytes


def test_misuse_is_explained():
    with pytest.raises(ValueError, match=r"Q4_0: found float32 \(18,\); allowed: uint8"):
        dequantize(np.zeros(18, np.float32), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="multiple of 18"):
        dequantize(np.zeros((2, 20), np.uint8), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="multiple of 144"):
        dequantize(np.zeros((), np.uint8), GGMLType.Q4_K)
    with pytest.raises(ValueError, match="I32 cannot be dequantized; supported: F32, F16, "):
        dequantize(np.zeros(4, np.uint8), GGMLType.I32)


@formats
def test_random_blocks_of_the_builder_are_well_scaled(ggml_type):
    x = dequantize(random_blocks((64, 1024), ggml_type, std=0.02, seed=3), ggml_type)
    assert np.isfinite(x).all()
    assert abs(x.std() / 0.02 - 1) < 0.05
    assert abs(x.mean()) < 0.004
