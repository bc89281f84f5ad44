"""Products of many sequences: how they are cut; on a GPU every format against float64, and bits against bits."""

import numpy as np
import pytest

from engine.cuda.driver.compiler import shared_limit
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.matrix.decode_gemm import DecodeGemm
from engine.cuda.matrix.decode_gemm_plan import Cut, choose_cut, group_cut, kernel_job, operand_bytes, supported
from engine.gguf.quants import dequantize
from engine.gguf.types import GGMLType
from tests.support.gpu.helpers import hopper_cupy
from tests.support.gpu.packed_rows import COMMON, RARE, nmse, packed, random_rows

ALL_TYPES = [type for type in LAYOUTS if supported([type], 90)]
TYPES = [type for type in COMMON if supported([type], 90)]
# Inputs are halves: a squared error of 2^-24 of the square of a term at most, a third of that on average; weights of
# the plain formats are rounded as well, and the largest ones of Q6_K.
TOLERANCE = 1.5e-7
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 128, 256)


def test_only_the_matrices_and_the_card_decide_the_order_of_sums():
    # 8B on 132 multiprocessors: output, qkv, gate and up; for few sequences, 128 blocks of 14 tiles.
    assert choose_cut(64, 16, 132) == Cut(4, 6)
    assert choose_cut(96, 16, 132) == Cut(4, 4)
    assert choose_cut(448, 16, 132) == Cut(4, 1)
    assert group_cut([(GGMLType.Q4_K, 14336)], 4096, 132, paired=True) == Cut(4, 1, 14)
    assert group_cut([(GGMLType.Q6_K, 2048)], 8192, 132) == Cut(4, 8, 9)
    for rows, columns in ((64, 128), (4096, 4096), (128256, 2048), (1, 14336)):
        cut = group_cut([(GGMLType.Q8_0, rows)], columns, 132)
        clusters = {kernel_job([GGMLType.Q8_0], cut, columns, batch)[1]["CLUSTER"] for batch in ROWS}
        assert clusters == {cut.cluster}
        assert cut.cluster <= -(-columns // 256)


@pytest.mark.parametrize("type", ALL_TYPES)
def test_stages_fit_shared_memory_and_sums_fit_stages(type):
    for columns in (256, 4096, 14336):
        for rows in (64, 4096, 28672):
            cut = group_cut([(type, rows)], columns, 132)
            for batch in (1, 9, 17, 64):
                defines = kernel_job([type], cut, columns, batch)[1]
                own = -(-columns // 256 // cut.cluster) if defines["RESIDENT"] else 0
                used = own * defines["NT"] * (17 * 256 + 64) + defines["STAGES"] * defines["STAGE"]
                assert defines["STAGES"] >= 1
                assert used + 2048 <= shared_limit(90)
                if cut.cluster > 1:
                    assert -(-defines["TILES"] // 4) * defines["NT"] * 8 * 68 * 4 <= used


def test_what_the_family_does_not_take():
    assert not supported([GGMLType.Q4_K], 80)
    assert not supported([GGMLType.Q4_K, GGMLType.F32], 90)
    assert operand_bytes(256) == 64 * 256 * 2 + 64 * 16 * 2 + 64 * 8  # halves, sums and their rests, two floats


@pytest.fixture(scope="module")
def cupy():
    return hopper_cupy()


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def product(cupy, matrices, activation=0):
    from engine.cuda.driver.compiler import prebuild
    from engine.cuda.matrix.decode_gemm_plan import operand_job

    multiply = DecodeGemm(matrices, 132)
    types, columns, paired = [m.type for m in matrices], matrices[0].columns, matrices[0].paired
    jobs = [
        kernel_job(types, multiply.cut, columns, batch, paired=paired, activation=activation) for batch in ROWS[:11]
    ]
    prebuild(list({repr(job): job for job in [operand_job(), *jobs]}.values()), 90)  # side by side, not one by one
    operand = cupy.empty(operand_bytes(matrices[0].columns), np.uint8)
    return lambda x, out, **more: multiply(cupy.asarray(x), out, operand, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (33, 768), (257, 4352), (130, 14336)])
def test_every_format_in_every_batch(cupy, rng, type, rows, columns):
    raw = random_rows(rng, type, rows, columns)
    weights = dequantize(raw, type).astype(np.float64)
    multiply = product(cupy, [packed(cupy, type, raw, columns)])
    x = (rng.standard_normal((256, columns)) * np.exp(rng.standard_normal((256, columns)))).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, columns).astype(np.float32)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * norm
    whole = cupy.full((256, rows), np.nan, np.float32)
    multiply(x, whole, norm=cupy.asarray(norm), eps=1e-5)
    whole = whole.get()
    assert nmse(whole, normed, weights) < TOLERANCE
    for batch in ROWS:
        chosen = rng.permutation(256)[:batch]
        out = cupy.full((batch, rows), np.nan, np.float32)
        multiply(x[chosen], out, norm=cupy.asarray(norm), eps=1e-5)
        assert np.array_equal(out.get(), whole[chosen])
    out = cupy.full((9, rows), 2.0, np.float32)
    multiply(x[:9], out, add=True)
    assert nmse(out.get() - 2.0, wide[:9], weights) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("type", RARE)
def test_other_formats(cupy, rng, type):
    rows, columns = 130, 4352
    raw = random_rows(rng, type, rows, columns)
    multiply = product(cupy, [packed(cupy, type, raw, columns)])
    x = (rng.standard_normal((64, columns)) * np.exp(rng.standard_normal((64, columns)))).astype(np.float32)
    whole = cupy.full((64, rows), np.nan, np.float32)
    multiply(x, whole)
    whole = whole.get()
    assert nmse(whole, x.astype(np.float64), dequantize(raw, type).astype(np.float64)) < TOLERANCE
    for batch in (3, 12, 20, 40):
        out = cupy.full((batch, rows), np.nan, np.float32)
        multiply(x[64 - batch :], out)
        assert np.array_equal(out.get(), whole[64 - batch :])


@pytest.mark.gpu
@pytest.mark.parametrize("type", [GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q5_1, GGMLType.F16])
def test_columns_that_fill_no_chunk(cupy, rng, type):
    for columns in (128, 416, 896):
        raw = random_rows(rng, type, 65, columns)
        x = rng.standard_normal((10, columns)).astype(np.float32)
        out = cupy.empty((10, 65), np.float32)
        product(cupy, [packed(cupy, type, raw, columns)])(x, out)
        assert nmse(out.get(), x.astype(np.float64), dequantize(raw, type).astype(np.float64)) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e7])
def test_group_of_types_with_bias_and_large_inputs(cupy, rng, magnitude):
    columns, parts = 1024, ((GGMLType.Q4_K, 48), (GGMLType.Q8_0, 17), (GGMLType.Q6_K, 30), (GGMLType.F16, 100))
    raws = [random_rows(rng, type, rows, columns) for type, rows in parts]
    weights = np.concatenate([dequantize(raw, type) for raw, (type, _) in zip(raws, parts, strict=True)])
    multiply = product(cupy, [packed(cupy, type, raw, columns) for raw, (type, _) in zip(raws, parts, strict=True)])
    bias = rng.integers(-3, 4, 195).astype(np.float32)
    x = (rng.standard_normal((20, columns)) * magnitude).astype(np.float32)
    out = cupy.empty((20, 195), np.float32)
    multiply(x, out, bias=cupy.asarray(bias * np.float32(magnitude)), alpha=0.5)
    found = out.get().astype(np.float64) - 0.5 * magnitude * bias
    assert nmse(found, x.astype(np.float64), weights.astype(np.float64), 0.5) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(8, 512), (41, 512), (40, 8192)])
def test_gate_and_up_in_one(cupy, rng, type, rows, columns):
    from engine.cuda.rows.activation import KernelActivation

    gate, up = random_rows(rng, type, rows, columns), random_rows(rng, type, rows, columns)
    multiply = product(cupy, [packed(cupy, type, gate, columns, partner=up)], KernelActivation.SILU)
    x = (rng.standard_normal((20, columns)) * 0.1).astype(np.float32)
    g, u = (x.astype(np.float64) @ dequantize(raw, type).astype(np.float64).T for raw in (gate, up))
    truth = g * 0.5 * (1 + np.tanh(g / 2)) * u
    for batch in (3, 20):
        out = cupy.empty((batch, rows), np.float32)
        multiply(x[:batch], out, activation=KernelActivation.SILU)
        assert np.sum((out.get() - truth[:batch]) ** 2) < 1e-6 * np.sum(truth[:batch] ** 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("type", "cut", "rows"), [
    (GGMLType.Q4_K, Cut(4, 6), 1024), (GGMLType.Q6_K, Cut(4, 2), 1000), (GGMLType.Q8_0, Cut(4, 4), 1024),
])  # fmt: skip
def test_an_operand_left_by_the_product_before_is_the_one_made_from_its_result(cupy, rng, type, cut, rows):
    columns, width = 1536, 1024
    first = DecodeGemm([packed(cupy, type, random_rows(rng, type, rows, columns), columns)], 132, cut)
    second = DecodeGemm([packed(cupy, GGMLType.Q4_0, random_rows(rng, GGMLType.Q4_0, 300, width), width)], 132)
    assert first.emits
    norm = cupy.asarray(rng.uniform(0.5, 1.5, width).astype(np.float32))
    scratch, left = (cupy.full(operand_bytes(columns), 255, np.uint8) for _ in range(2))
    for batch in (17, 30, 33, 64):
        x = cupy.asarray(rng.standard_normal((batch, columns)).astype(np.float32))
        stream = cupy.asarray(rng.standard_normal((batch, width)).astype(np.float32))
        stream[:, rows:] = 0
        before, expected, found = (
            stream.copy(),
            cupy.empty((batch, 300), np.float32),
            cupy.empty((batch, 300), np.float32),
        )
        first(x, stream, scratch, add=True)
        second(stream, expected, scratch, norm=norm, eps=1e-5)
        first(x, before, scratch, add=True, emitted=(norm, left))
        second(before, found, left, norm=norm, eps=1e-5, ready=True)
        assert cupy.array_equal(stream, before)
        assert cupy.array_equal(expected, found)
