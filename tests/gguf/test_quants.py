"""Dequantization, bit for bit against the gguf package, or for types it lacks against the plain loops beside this."""

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gguf import FORMATS, GGMLType, dequantize
from engine.gguf.formats.block_format import BlockFormat
from engine.gguf.formats.grids import grid, signs_of_seven
from tests.support import block_references
from tests.support.models.gguf_builder import random_blocks

# Scales of every kind: zeros, smallest and largest subnormal, smallest normal, one, largest, infinities, NaNs.
EDGE_HALVES = np.frombuffer(
    bytes.fromhex("0000 8000 0001 8001 03FF 83FF 0400 3C00 BC00 7BFF FBFF 7C00 FC00 7E00 7C01 FE00"), ">u2"
).astype(np.uint16)
EDGE_BYTES = np.array([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, 0x55, 0xAA], np.uint8)


def reference(raw: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """What the gguf package makes of packed rows, or block_references for the types it leaves out."""
    if ggml_type in block_references.TYPES:
        return block_references.decode(raw, ggml_type)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
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


def test_every_type_has_a_format():
    assert set(FORMATS) == set(GGMLType)
    for ggml_type, fmt in FORMATS.items():
        assert (fmt.type, fmt.block_size, fmt.type_size) == (ggml_type, ggml_type.block_size, ggml_type.type_size)
        assert fmt.layout.itemsize == ggml_type.type_size
    for ggml_type in gguf.GGMLQuantizationType:
        assert gguf.GGML_QUANT_SIZES[ggml_type] == (GGMLType(ggml_type).block_size, GGMLType(ggml_type).type_size)


def test_types_without_a_reference_in_the_gguf_package_are_the_listed_ones():
    """When the package can decode a type, it is the reference, not this project's own loops."""
    missing = []
    for ggml_type in FORMATS:
        try:
            gguf.quants.dequantize(np.zeros(ggml_type.type_size, np.uint8), gguf.GGMLQuantizationType(int(ggml_type)))
        except (NotImplementedError, ValueError):
            missing.append(ggml_type)
    assert set(missing) == set(block_references.TYPES)


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
    if ggml_type is GGMLType.IQ1_M:
        parts = np.resize(EDGE_HALVES, len(blocks))[:, None] >> np.arange(0, 16, 4) & 15
        blocks["scales"] = blocks["scales"] & 0x0FFF | (parts << 12).astype(np.uint16)
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
    tried = range(0, fmt.type_size, 7 if ggml_type is GGMLType.Q8_K else 1)  # 256 of its bytes are all alike
    raw = np.full((len(tried), 256, fmt.type_size), 0xA5, np.uint8)
    for name in half_fields(fmt):
        raw.reshape(-1).view(fmt.layout)[name] = 1
    for case, byte in enumerate(tried):
        raw[case, :, byte] = np.arange(256)
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
    with pytest.raises(ValueError, match=r"IQ2_S: found uint8 \(66,\); allowed: .* multiple of 82"):
        dequantize(np.zeros(66, np.uint8), GGMLType.IQ2_S)


@formats
def test_random_blocks_of_the_builder_are_well_scaled(ggml_type):
    std = 20 if ggml_type.name in ("I8", "I16", "I32", "I64") else 0.02
    x = dequantize(random_blocks((64, 1024), ggml_type, std=std, seed=3), ggml_type)
    assert np.isfinite(x).all()
    assert abs(x.std() / std - 1) < 0.05
    assert abs(x.mean()) < 0.2 * std


@settings(max_examples=150, deadline=None)
@given(ggml_type=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_any_bytes(ggml_type, data):
    """Whatever a damaged or hostile file holds decodes as the reference decodes it."""
    raw = np.frombuffer(data.draw(st.binary(min_size=ggml_type.type_size, max_size=ggml_type.type_size)), np.uint8)
    assert_same_bits(FORMATS[ggml_type].dequantize(raw[None]), reference(raw[None], ggml_type))


HAND_MADE = {
    # d = 2; q = -128, 127, then zeros; the sums hold nonsense that must not matter
    "Q8_1": ("00000040 FFFFFFFF 807F" + "00" * 30, [-256, 254, *[0] * 30]),
    "Q8_K": ("0000003F 01FF" + "00" * 254 + "EE" * 32, [0.5, -0.5, *[0] * 254]),
    # d = 1.5; the first byte 0b00000101, the last 0b10000000
    "Q1_0": ("003E 05" + "00" * 14 + "80", [1.5, -1.5, 1.5, *[-1.5] * 124, 1.5]),
    # d = 0.25; the first byte 0b11_10_01_00: -1, 0, 1, 2 times d; then all codes 1
    "Q2_0": ("0034 E4" + "55" * 15, [-0.25, 0, 0.25, 0.5, *[0] * 60]),
    # scales in E4M3: 0x38 = 1, 0x30 = 1/2, 0x01 = 2^-9, 0x7F = 0; codes 0 ... 15 in order, low halves first
    "NVFP4": (
        "3830017F" + "8091A2B3C4D5E6F7" * 4,
        [
            s * x
            for s in (1, 0.5, 2**-9, 0)
            for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
        ],
    ),
    # e = 128: 2^1; same codes
    "MXFP4": ("80" + "1032547698BADCFE" * 2, [2 * x for x in (0, 1, 2, 4, 0, -1, -2, -4) * 2]
              + [2 * x for x in (0.5, 1.5, 3, 6, -0.5, -1.5, -3, -6) * 2]),
    "I8": ("80", [-128]),
    "I16": ("0080", [-32768]),
    "I32": ("01000001", [2**24]),  # 2^24 + 1 rounds to even
    "I64": ("0000000000000080", [-(2.0**63)]),
    "F64": ("000000000000F83F", [1.5]),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_blocks(name):
    packed, expected = HAND_MADE[name]
    raw = np.frombuffer(bytes.fromhex(packed), np.uint8)
    np.testing.assert_array_equal(dequantize(raw, GGMLType[name]), np.array(expected, np.float32))


def test_grids_are_those_of_the_gguf_package():
    for name in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"):
        package = getattr(gguf.quants, name)
        package.init_grid()
        np.testing.assert_array_equal(grid(name), package.grid[0, 0])
    np.testing.assert_array_equal(signs_of_seven(), np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8))
