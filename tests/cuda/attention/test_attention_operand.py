"""What decode attention leaves for the output projection is what the kernel that converts rows makes of its result."""

import numpy as np
import pytest

from engine.config import KvType
from engine.cuda.attention.attention import KernelRopeStyle, build_jobs, decode_plan
from tests.support.gpu.attention_reference import World, shape_of

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


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (32, 8, 64), (32, 4, 128), (8, 4, 128)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_operand_left_is_that_of_the_result(heads, kv_heads, dim, repeats):
    from engine.cuda.attention.attention import Attention
    from engine.cuda.driver.compiler import build
    from engine.cuda.driver.launch import launch
    from engine.cuda.matrix.decode_gemm_plan import groups_of_eight, operand_bytes, operand_job

    shape = shape_of(heads, kv_heads, dim, style=KernelRopeStyle.HALVES)
    assert shape.kv_type is KvType.F16
    lengths = LENGTHS * repeats
    world, n, width = World(shape, lengths, seed=3), len(lengths), heads * dim
    cp = world.cp
    kernels = Attention(shape, n)
    if not kernels.plan.leaves_operand:
        pytest.skip("no Hopper card")
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
