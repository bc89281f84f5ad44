"""What decode attention leaves for the output projection is what the kernel that converts rows makes of its result."""

import ctypes

import numpy as np
import pytest

from engine.config import PAGE, KvType
from engine.cuda.attention.attention import KernelRopeStyle, build_jobs, decode_plan
from engine.cuda.attention.attention_plan import jobs_of_plans
from engine.cuda.driver.compiler import kernel_files
from engine.cuda.matrix.decode_gemm_plan import groups_of_eight, operand_bytes
from tests.support.gpu.attention_on_host import PLAIN, host_plan, host_source
from tests.support.gpu.attention_reference import World, shape_of
from tests.support.gpu.host_kernels import address, host_library

LENGTHS = [0, 1, 63, 64, 127, 128, 129, 300, 511, 640, 777, 1500, 4000, 2, 90, 200, 256]
"""Rows of one range, rows whose ranges share a block, and rows that several blocks share."""


def test_heads_that_are_whole_operands_leave_them_on_hopper():
    def leaves(heads, kv_heads, dim, arch=90, **options):
        shape = shape_of(heads, kv_heads, dim, **options)
        plan = decode_plan(shape, arch, 132)
        jobs = build_jobs(shape, arch, 132)[:2]
        assert [bool(defines.get("LEAVES_OPERAND")) for _, defines in jobs] == [plan.leaves_operand, False]
        return plan.leaves_operand

    assert leaves(32, 8, 128)
    assert leaves(32, 8, 64)
    assert leaves(32, 4, 128)
    assert not leaves(32, 32, 128), "128 columns a block"
    assert not leaves(64, 4, 128), "two blocks a cache head"
    assert not leaves(32, 8, 128, arch=80)
    assert not leaves(32, 8, 128, half=False)


ON_HOST = """
extern "C" void decode(int columns, int blocks, int threads, const float* qkv, const float* k, const float* v,
                       const int* table, int pages, const int* positions, int rows, const double* inv_freq,
                       const float* sinks, int slots, float* partial, float2* sums, int* counters, float* out,
                       u8* operand, int groups) {
    using namespace of_runs;
    launch_blocks(Dimensions{columns, blocks, 1}, threads, [&] {
        attention_decode(qkv, (float*)k, (float*)v, table, pages, positions, rows, inv_freq, 1.0f, 0.0f, 1, 0, nullptr,
                         nullptr, 0.0f, 0.1f, 0.0f, 0, sinks, slots, partial, sums, counters, out, operand, groups);
    });
}
extern "C" void convert_rows(int chunks, int groups, const float* x, int rows, u8* operand) {
    using namespace of_runs;
    launch_blocks(Dimensions{chunks, (rows + 7) / 8, 1}, 256,
                  [&] { batch_operand(x, chunks * 256, nullptr, chunks * 256, rows, groups, operand); });
}
"""
LARGEST = """#include "blocks_on_host.h"
static u32 __reduce_max_sync(u32 mask, u32 v) {
    for (int offset = 16; offset; offset >>= 1) v = std::max(v, __shfl_xor_sync(mask, v, offset));
    return v;
}
"""


def test_what_is_left_on_the_host(tmp_path):
    """The general kernel, which shares all that happens behind the scores, with a cache of float32."""
    shape = shape_of(8, 2, 64, half=False)
    plan, width = host_plan(shape), 512
    files, defines = jobs_of_plans(shape, plan, PLAIN)[0]
    at = files.index("attention_decode.cuh")
    files = (*files[:at], "decode_gemm_convert.cuh", *files[at:], "decode_gemm_operand.cu")
    text = {name: path.read_text(encoding="utf-8") for name, path in kernel_files().items()}
    defines = defines | {"SHARED_BYTES": plan.shared_bytes, "LEAVES_OPERAND": 1}
    library = host_library(tmp_path, LARGEST + host_source("runs", files, defines, text) + ON_HOST)
    random = np.random.default_rng(0)
    positions = np.array([0, 5, 63, 64, 100, 150, 190, 3, 20, 180, 77, 64, 1, 2, 130, 191, 128], np.int32)
    n, pages, columns = len(positions), 3, shape.kv_heads * shape.head_tiles
    table, groups = np.arange(n * pages, dtype=np.int32), groups_of_eight(n)
    keys, values = (random.normal(size=(n * pages, 2, PAGE, 64)).astype(np.float32) for _ in range(2))
    rows = random.normal(size=(n, shape.row_width)).astype(np.float32)
    frequencies, sinks = 10000.0 ** (-np.arange(32) / 32), np.linspace(-1, 1, 8, dtype=np.float32)
    slots = n * plan.n_splits
    for blocks in (1, 3, 7):  # rows whole in a block, and shared ones
        partial, sums = (np.full(columns * slots * 4 * size, np.nan, np.float32) for size in (64, 2))
        counters, out = np.zeros(n * columns, np.int32), np.zeros((n, width), np.float32)
        left, converted = (np.zeros(operand_bytes(width), np.uint8) for _ in range(2))
        given = (
            rows,
            keys,
            values,
            table,
            pages,
            positions,
            n,
            frequencies,
            sinks,
            slots,
            partial,
            sums,
            counters,
            out,
        )
        given = [address(one) if isinstance(one, np.ndarray) else ctypes.c_int(one) for one in given]
        library.decode(columns, blocks, plan.warps * 32, *given, address(left), groups)
        library.convert_rows(width // 256, groups, address(out), n, address(converted))
        assert np.isfinite(out).all()
        assert left.any()
        assert left.tobytes() == converted.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (32, 8, 64), (32, 4, 128), (8, 4, 128)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_operand_left_is_that_of_the_result(heads, kv_heads, dim, repeats):
    from engine.cuda.attention.attention import Attention
    from engine.cuda.driver.compiler import build, device_arch
    from engine.cuda.driver.launch import launch
    from engine.cuda.matrix.decode_gemm_plan import operand_job

    if device_arch() != 90:
        pytest.skip("no Hopper card")
    shape = shape_of(heads, kv_heads, dim, style=KernelRopeStyle.HALVES)
    assert shape.kv_type is KvType.F16
    lengths = LENGTHS * repeats
    world, n, width = World(shape, lengths, seed=3), len(lengths), heads * dim
    cp = world.cp
    kernels = Attention(shape, n)
    assert kernels.plan.leaves_operand
    out = cp.zeros((n, width), np.float32)
    left, converted = (cp.zeros(operand_bytes(width), np.uint8) for _ in range(2))
    rows = cp.asarray(world.rows(n))
    args = (world.layer, rows, world.cache_k, world.cache_v, cp.asarray(world.table), cp.asarray(np.int32(lengths)))
    kernels.decode(*args, out, operand=left)
    groups = groups_of_eight(n)
    kernel = build(operand_job()[0]).get("batch_operand")
    launch(kernel, (width // 256, -(-n // 8)), 256, (out, width, None, width, n, groups, converted))
    assert left.get().tobytes() == converted.get().tobytes()
    plain = cp.zeros((n, width), np.float32)
    kernels.decode(*args, plain)
    assert plain.get().tobytes() == out.get().tobytes()
