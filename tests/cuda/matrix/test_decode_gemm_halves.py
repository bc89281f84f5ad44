"""Operands that gate and up leave by halves: byte for byte those that the converting kernel makes of the result."""

import ctypes

import numpy as np
import pytest

from engine.cuda.driver.compiler import kernel_files
from engine.cuda.matrix.decode_gemm_plan import (
    HALF,
    MAX_ROWS,
    Cut,
    emits_halves,
    group_cut,
    groups_of_eight,
    kernel_job,
    operand_bytes,
    operand_job,
    word_count,
)
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import FORMATS
from engine.gguf.types import GGMLType
from tests.support.gpu.attention_on_host import host_source
from tests.support.gpu.helpers import hopper_cupy
from tests.support.gpu.host_kernels import address, host_library
from tests.support.gpu.packed_rows import packed, random_rows

SHAPES = (
    (GGMLType.Q4_K, 14336, 4096, Cut(4, 1)),
    (GGMLType.Q4_K, 8192, 2048, Cut(4, 2)),
    (GGMLType.Q8_0, 1016, 512, Cut(4, 2)),
    (GGMLType.Q6_K, 1001, 768, Cut(4, 1)),
)
"""Type, outputs, columns and cut of gate and up: of 8B, of 1B, and last halves that are not full."""
FACTOR, SQUARES = 0, 1


def without_squares(operand, columns, groups):
    """Bytes of an operand but for the sums of squares, which no product without a norm reads."""
    size = groups * (17 * 256 + 64)
    chunks = operand[: -(-columns // 256) * size].reshape(-1, size)
    floats = chunks[:, groups * 17 * 256 :].copy().view(np.float32).reshape(-1, 2, groups * 8)
    assert not np.isnan(floats[:, SQUARES]).any()
    return chunks[:, : groups * 17 * 256].tobytes() + floats[:, FACTOR].tobytes()


def factors(operand, batch, columns, groups):
    """Of every 256 columns and sequence of an operand."""
    chunks = operand[: -(-columns // 256) * groups * (17 * 256 + 64)].reshape(-(-columns // 256), -1)
    return chunks[:, groups * 17 * 256 :].copy().view(np.float32)[:, :batch]


def unlike_sequences(x):
    """Makes rows of x (17 or more, K), which an operand is made of, show every case of the factor, in place."""
    x[1] *= 1e-4
    x[2] *= 1e5
    for row, (at, size) in zip((3, 4, 5, 6), ((0, 1e-4), (1, 1e-4), (0, 1e5), (1, 1e5)), strict=True):
        x[row].reshape(-1, HALF)[at::2] *= np.float32(size)
    x[7] = 0
    x[8].reshape(-1, HALF)[::2] = 0
    x[9].reshape(-1, HALF)[1::2] = 0
    x[9] *= 1e-4
    x[10, ::3] = 0
    x[11] *= 1e-37
    x[12].reshape(-1, HALF)[::3] *= np.float32(1e20)


def test_which_products_leave_halves():
    def leaves(type, rows, columns, cut=None, **options):
        cut = cut or group_cut([(type, rows)], columns, 132, paired=True)
        return emits_halves([type], rows, cut, 132, **({"paired": True} | options))

    assert all(leaves(*shape) for shape in SHAPES)
    assert all(leaves(*shape[:3]) for shape in SHAPES[:2])
    assert not leaves(GGMLType.Q4_K, 14336, 4096, paired=False)
    assert not leaves(GGMLType.Q4_K, 8192 + 128, 2048), "a half without a partner"
    assert not emits_halves([GGMLType.Q4_K], 128 * 134, Cut(4, 1), 132, paired=True), "two turns"
    assert emits_halves([GGMLType.Q4_K], 128 * 134, Cut(4, 2), 132, paired=True)
    assert not emits_halves([GGMLType.Q4_K], 8192, Cut(2, 2), 132, paired=True), "64 outputs"
    assert word_count(14336) == 56 * MAX_ROWS
    defines = [kernel_job([GGMLType.Q4_K], Cut(4, 1), 4096, 64, paired=True, halves=one)[1] for one in (False, True)]
    assert [one.get("LEAVES_HALVES") for one in defines] == [None, 1]


ON_HOST = """
extern "C" void leave(int blocks, int warps, int backwards, const float* x, int columns, int rows, float* out,
                      u8* operand, int* words) {
    using namespace of_halves;
    launch_blocks(blocks, 1, warps * 32, [&] {  // a warp has some sequences of a half
        const int lane = threadIdx.x % 32, items = gridDim.x * (blockDim.x / 32);
        int item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
        if (backwards) item = items - 1 - item;
        const int step = ALL_WARPS, first = item / 2 % step, group = item / (2 * step), half = item % 2;
        float4 v[WARP_SEQUENCES];
        for (int k = 0; k < WARP_SEQUENCES; ++k) {
            const int at = group * 256 + half * 128 + lane * 4, b = first + k * step;
            const auto one = [&](int k) { return b < rows && k < columns ? x[(i64)b * columns + k] : 0.0f; };
            v[k] = make_float4(one(at), one(at + 1), one(at + 2), one(at + 3));
        }
        leave_halves(v, first, step, rows, half, lane, out + group * 256, columns, columns - group * 256,
                     operand + (i64)group * X_BYTES, words + group * MOST_SEQUENCES);
    });
}
extern "C" void convert_rows(int chunks, int groups, const float* x, int columns, int rows, u8* operand) {
    using namespace of_halves;
    launch_blocks(Dimensions{chunks, (rows + 7) / 8, 1}, 256,
                  [&] { batch_operand(x, columns, nullptr, columns, rows, groups, operand); });
}
"""
BEFORE = """#include "blocks_on_host.h"
static u32 __reduce_max_sync(u32 mask, u32 v) {
    for (int offset = 16; offset; offset >>= 1) v = std::max(v, __shfl_xor_sync(mask, v, offset));
    return v;
}
static int words_added(int* word, int n) {
    const int old = *word;
    *word += n;
    return old;
}
static int word_after_a_turn(const int* word) {
    wait_for(Wait::FOR_WARP, 1u << threadIdx.x % 32);
    return *word;
}
"""
ASSEMBLY = (
    ('asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(n) : "memory");',
     "old = words_added(word, n);"),
    ('asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(word), "r"(n) : "memory");',
     "words_added(word, n);"),
    ('asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(word) : "memory");',
     "v = word_after_a_turn(word);"),
)  # fmt: skip


@pytest.mark.parametrize(("rows", "cluster"), [(64, 1), (17, 1), (33, 2), (30, 4)])
def test_halves_on_the_host(tmp_path, rows, cluster):
    """Both halves of a sequence in one block, whose warps take turns, and one after the other in either order."""
    text = {name: path.read_text(encoding="utf-8") for name, path in kernel_files().items()}
    for assembly, by in ASSEMBLY:
        assert text["decode_gemm_halves.cuh"].count(assembly) == 1
        text["decode_gemm_halves.cuh"] = text["decode_gemm_halves.cuh"].replace(assembly, by)
    groups, columns = groups_of_eight(rows), 1016
    text["sizes"] = "constexpr int STEP_BYTES = NT * 256, SUMS_AT = 16 * STEP_BYTES, FLOATS_AT = 17 * STEP_BYTES;\n"
    text["sizes"] += "constexpr int X_BYTES = operand_bytes(NT), ALL_WARPS = CLUSTER * TILES;\n"
    files = ("decode_gemm_convert.cuh", "sizes", "decode_gemm_halves.cuh", "decode_gemm_operand.cu")
    source = host_source("halves", files, {"NT": groups, "CLUSTER": cluster, "TILES": 16}, text)
    library = host_library(tmp_path, BEFORE + source + ON_HOST)
    x = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    unlike_sequences(x)
    x = np.ascontiguousarray(x[:, :columns])
    warps = 4 * 2 * 16 * cluster
    converted = np.zeros(operand_bytes(columns), np.uint8)
    library.convert_rows(4, groups, address(x), columns, rows, address(converted))
    assert len(np.unique(factors(converted, rows, columns, groups))) > 3
    for blocks, backwards in ((warps, 0), (warps, 1), (warps // 2, 0), (warps // 8, 0), (warps // 32, 1)):
        out, left = np.zeros_like(x), np.zeros_like(converted)
        words = np.zeros(word_count(columns), np.int32)
        sizes = (ctypes.c_int(one) for one in (blocks, warps // blocks, backwards))
        shape = (ctypes.c_int(columns), ctypes.c_int(rows))
        library.leave(*sizes, address(x), *shape, address(out), address(left), address(words))
        assert np.array_equal(out, x)
        assert not words.any()
        assert without_squares(left, columns, groups) == without_squares(converted, columns, groups)


@pytest.fixture(scope="module")
def cupy():
    return hopper_cupy()


@pytest.mark.gpu
@pytest.mark.parametrize(("type", "rows", "columns", "cut"), SHAPES)
@pytest.mark.parametrize("batch", [17, 32, 33, 64])
def test_the_operand_left_is_that_of_the_result(cupy, type, rows, columns, cut, batch):
    from engine.cuda.driver.compiler import build
    from engine.cuda.driver.launch import launch
    from engine.cuda.matrix.decode_gemm import DecodeGemm

    rng = np.random.default_rng(rows + batch)
    gate, up = random_rows(rng, type, rows, columns), random_rows(rng, type, rows, columns)
    multiply = DecodeGemm([packed(cupy, type, gate, columns, partner=up)], 132, cut)
    assert multiply.emits_halves
    groups, chunks, scratch = groups_of_eight(batch), -(-rows // 256), cupy.zeros(operand_bytes(columns), np.uint8)
    norm = cupy.asarray(rng.uniform(0.5, 1.5, columns).astype(np.float32))
    words = cupy.zeros(word_count(rows), np.int32)
    convert = build(operand_job()[0]).get("batch_operand")
    many = {"activation": KernelActivation.SILU}
    seen = set()
    # Inputs whose results are ordinary, tiny, huge, and all of that side by side.
    for size, normed in ((1.0, True), (0.05, False), (1e-4, False), (300.0, False), (None, False)):
        x = rng.standard_normal((batch, columns)).astype(np.float32)
        x *= np.float32(size) if size else np.float32(10.0) ** rng.uniform(-6, 5, (batch, 1)).astype(np.float32)
        x[batch // 2] = 0
        x, more = cupy.asarray(x), {"norm": norm, "eps": 1e-5} if normed else {}
        plain, out = (cupy.full((batch, rows), np.nan, np.float32) for _ in range(2))
        multiply(x, plain, scratch, **many, **more)
        converted = cupy.zeros(operand_bytes(rows), np.uint8)
        launch(convert, (chunks, -(-batch // 8)), 256, (plain, rows, None, rows, batch, groups, converted))
        expected = without_squares(converted.get(), rows, groups)
        seen |= set(factors(converted.get(), batch, rows, groups).ravel().tolist())
        for ready in (False, True) * 10:
            left = cupy.zeros(operand_bytes(rows), np.uint8)
            out.fill(np.nan)
            multiply(x, out, scratch, **many, **more, ready=ready, halves=(left, words))
            assert cupy.array_equal(out, plain)
            assert not words.any()
            assert without_squares(left.get(), rows, groups) == expected
    assert 1.0 in seen
    assert min(seen) < 1.0 < max(seen)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "cut"), [shape[1:] for shape in SHAPES])
def test_halves_that_are_unlike(cupy, rows, columns, cut):
    """One half tiny, huge or nothing beside an ordinary one: the rows of `up` are as large as that takes."""
    from engine.cuda.driver.compiler import build
    from engine.cuda.driver.launch import launch
    from engine.cuda.matrix.decode_gemm import DecodeGemm

    rng = np.random.default_rng(5)
    gate, up = (random_rows(rng, GGMLType.Q8_0, rows, columns) for _ in range(2))
    scales = up.reshape(-1).view(FORMATS[GGMLType.Q8_0].layout)["d"].reshape(rows, -1)
    # Pairs: tiny and ordinary, ordinary and huge, nothing and tiny, huge and tiny, ordinary and ordinary.
    sizes = (1e-4, 1, 1, 1e3, 0, 1e-4, 1e3, 1e-4, 1, 1)
    for half in range(-(-rows // HALF)):
        scales[half * HALF : (half + 1) * HALF] *= np.float16(sizes[half % 10])
    multiply = DecodeGemm([packed(cupy, GGMLType.Q8_0, gate, columns, partner=up)], 132, cut)
    assert multiply.emits_halves
    words, convert = cupy.zeros(word_count(rows), np.int32), build(operand_job()[0]).get("batch_operand")
    scratch, chunks = cupy.zeros(operand_bytes(columns), np.uint8), -(-rows // 256)
    for batch in (32, 64):
        groups = groups_of_eight(batch)
        # Products of about 2, so that those of ordinary rows are of a usual size.
        x = cupy.asarray((rng.standard_normal((batch, columns)) * (2.7 / columns**0.5)).astype(np.float32))
        plain, converted = cupy.empty((batch, rows), np.float32), cupy.zeros(operand_bytes(rows), np.uint8)
        multiply(x, plain, scratch, activation=KernelActivation.SILU)
        launch(convert, (chunks, -(-batch // 8)), 256, (plain, rows, None, rows, batch, groups, converted))
        expected, seen = without_squares(converted.get(), rows, groups), factors(converted.get(), batch, rows, groups)
        assert seen.min() < 1 < seen.max()
        assert (seen == 1).any()
        for _ in range(20):
            out, left = cupy.zeros((batch, rows), np.float32), cupy.zeros(operand_bytes(rows), np.uint8)
            multiply(x, out, scratch, activation=KernelActivation.SILU, halves=(left, words))
            assert cupy.array_equal(out, plain)
            assert not words.any()
            assert without_squares(left.get(), rows, groups) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(("type", "rows", "columns", "cut"), SHAPES[:2])
def test_down_gives_the_same_bits(cupy, type, rows, columns, cut):
    """Launched early behind gate and up, many times in one stream without a wait between."""
    from engine.cuda.matrix.decode_gemm import DecodeGemm

    rng = np.random.default_rng(9)
    gate, up = random_rows(rng, type, rows, columns), random_rows(rng, type, rows, columns)
    first = DecodeGemm([packed(cupy, type, gate, columns, partner=up)], 132, cut)
    second = DecodeGemm([packed(cupy, GGMLType.Q4_0, random_rows(rng, GGMLType.Q4_0, 512, rows), rows)], 132)
    words = cupy.zeros(word_count(rows), np.int32)
    scratch, left = (cupy.zeros(operand_bytes(size), np.uint8) for size in (max(rows, columns), rows))
    many = {"activation": KernelActivation.SILU}
    for batch in (17, 64):
        x = rng.standard_normal((batch, columns)).astype(np.float32) * np.float32(10.0) ** rng.uniform(
            -4, 4, (batch, 1)
        )
        x = cupy.asarray(x.astype(np.float32))
        hidden, expected = cupy.empty((batch, rows), np.float32), cupy.empty((batch, 512), np.float32)
        first(x, hidden, scratch, **many)
        second(hidden, expected, scratch)
        found = cupy.full((20, batch, 512), np.nan, np.float32)
        for out in found:
            first(x, hidden, scratch, **many, halves=(left, words))
            second(hidden, out, left, ready=True)
        assert not words.any()
        assert all(cupy.array_equal(one, expected) for one in found)
