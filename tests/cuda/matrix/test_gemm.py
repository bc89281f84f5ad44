"""Products of prompts: tile choice and builds anywhere; on a Hopper GPU every format, and the same bits for every T."""

import numpy as np
import pytest

from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.matrix.gemm_plan import supports
from engine.gguf.quants import dequantize
from engine.gguf.types import GGMLType
from tests.support.gpu.helpers import hopper_cupy
from tests.support.gpu.packed_rows import COMMON, RARE, nmse, operand_rows, packed, random_rows

ALL_TYPES = [type for type in LAYOUTS if supports(type)]
TYPES = [type for type in COMMON if supports(type)]
# Operands are halfs: x and the weight are each off by up to 2^-12 of their size, evenly spread: 2 * 2^-24 / 3 = 4e-8 of
# the square. Scales (and minimums, which are larger than what is left of them) are rounded to halfs as well.
TOLERANCE = 2.5e-7
ROWS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 512, 1000, 2048)


def test_tiles_are_chosen_by_rounds_over_the_card():
    from engine.cuda.matrix.gemm_plan import choose_tile

    def chosen(rows, tokens, columns):
        tile = choose_tile(rows // 64, tokens, columns, 132)
        return tile.groups, tile.tokens

    assert chosen(4096, 1, 4096) == (1, 16)
    assert chosen(4096, 512, 14336) == (2, 128)  # 128 tiles for 132 multiprocessors
    assert chosen(6144, 512, 4096) == (3, 128)
    assert chosen(2048, 512, 8192) == (1, 128)  # 128 tiles of half the outputs
    assert chosen(28672, 2048, 4096) == (2, 256)


def test_steps_of_many_rows_use_the_whole_card():
    from engine.cuda.matrix.gemm_plan import choose_tile

    def chosen(rows, tokens, columns):
        tile = choose_tile(rows // 64, tokens, columns, 132, True)
        return tile.groups, tile.tokens, tile.parts

    assert chosen(4096, 128, 14336) == (2, 128, 3)  # 32 tiles, 96 blocks
    assert chosen(6144, 128, 4096) == (2, 128, 2)
    assert chosen(28672, 128, 4096) == (2, 128, 1)
    assert chosen(4096, 512, 14336) == (2, 128, 1)
    assert chosen(4096, 128, 512)[2] == 1  # too few columns to share


def test_families_share_kernels_and_leave_float32_out():
    from engine.cuda.matrix.gemm_plan import MAX_FORMATS, family

    assert not supports(GGMLType.F32)
    families = family([*LAYOUTS, GGMLType.Q4_K])
    assert sorted(type for members in families for type in members) == sorted(ALL_TYPES)
    for members in families:
        assert len(members) <= MAX_FORMATS
        assert len({LAYOUTS[type].chunk_columns for type in members}) == 1


def test_every_block_fits_its_multiprocessor():
    from engine.cuda.driver.compiler import shared_limit
    from engine.cuda.matrix.gemm_plan import EXPERT_TILES, STEP_TILES, TILES, family, shared_bytes

    for members in [*family(ALL_TYPES), *((type,) for type in ALL_TYPES)]:
        for tile in (*TILES, *STEP_TILES, *EXPERT_TILES):
            # The driver takes 1 KiB per block, of 228.
            assert tile.blocks * (shared_bytes(members, tile) + 1024) <= shared_limit(90) + 1024


@pytest.mark.parametrize("type", TYPES + RARE[2::3], ids=lambda type: type.name)
def test_multiplications_stay_in_flight(type):
    """The assembler says so where it had to put a wait behind every multiplication: a third of the speed."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    from engine.cuda.driver.compiler import BASE_OPTIONS, kernel_source
    from engine.cuda.matrix.gemm_plan import EXPERT_TILES, STEP_TILES, TILES, build_job
    from engine.cuda.rows.activation import KernelActivation

    tiles = (*TILES, *STEP_TILES, *EXPERT_TILES[:-1])
    tile = tiles[ALL_TYPES.index(type) % len(tiles)]
    program = nvrtc.createProgram(kernel_source(*build_job([type], tile, KernelActivation.SILU)), "gemm.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*BASE_OPTIONS, "-arch=sm_90a", "--ptxas-options=-v"))
        log = nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    assert "registers" in log
    assert "serialized" not in log


@pytest.fixture(scope="module")
def cupy():
    cupy = hopper_cupy()
    from engine.cuda.driver import compiler
    from engine.cuda.formats import repack
    from engine.cuda.matrix import gemm_plan
    from engine.cuda.rows.activation import KernelActivation

    jobs = [*gemm_plan.build_jobs(TYPES, KernelActivation.NONE), *(repack.build_job(type) for type in TYPES + RARE)]
    jobs += gemm_plan.build_jobs(RARE, KernelActivation.NONE)
    compiler.prebuild(
        [
            *jobs,
            *(
                gemm_plan.build_job((GGMLType.Q4_K,), tile, KernelActivation(n))
                for tile in gemm_plan.TILES
                for n in ACTIVATIONS
            ),
        ],
        90,
    )
    return cupy


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def operand(cupy, x, norm=None):
    from engine.cuda.matrix.gemm import make_operand
    from engine.cuda.matrix.gemm_plan import operand_bytes

    room = cupy.full(operand_bytes(*x.shape), 255, cupy.uint8)  # not-a-numbers where nothing is written
    weight = None if norm is None else cupy.asarray(norm)
    return make_operand(cupy.asarray(x), room, norm=weight, eps=1e-5)


@pytest.mark.parametrize("columns", [64, 768, 2048, 4100, 9000])
def test_rows_become_operands(tmp_path, rng, columns):
    """On the CPU: norms, copies with weights, places, columns that fill no block, values beyond the halves' range."""
    from engine.cuda.matrix.gemm_plan import OPERAND_FILES
    from tests.support.gpu.host_kernels import HostKernels

    host = HostKernels(tmp_path, [(OPERAND_FILES, {})])
    kernel = host.build(OPERAND_FILES, defines={}).get("operand_half")
    x = rng.standard_normal((3, columns)).astype(np.float32)
    x[2, 5] = 1e6
    norm, by = rng.uniform(0.5, 1.5, columns).astype(np.float32), np.float32([[1, 2], [0.5, 3], [1, 1]])
    places, padded = np.int32([[4, 0], [1, -1], [5, 2]]), -(-columns // 128) * 128
    normed = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5) * norm
    for weight, target, factors in ((None, None, None), (norm, None, None), (norm, places, by), (None, places, None)):
        room = np.full(padded // 64 * 8 * 128, 0x7F, np.uint8)
        copies = 1 if target is None else 2
        host.launch(kernel, 3, 256, (x, columns, room, 8, columns, padded, weight, 1e-5, target, copies, factors))
        found = operand_rows(room, 8, padded).astype(np.float64)
        for row in range(3):
            for copy in range(copies):
                place = row if target is None else target[row, copy]
                if place < 0:
                    continue
                wanted = (x if weight is None else normed)[row] * (1 if factors is None else factors[row, copy])
                wanted = np.clip(wanted, -65504, 65504)
                assert np.abs(found[place, :columns] - wanted).max() <= 6e-4 * np.abs(wanted).max()
                assert np.allclose(found[place, :columns], wanted, rtol=6e-4, atol=1e-6)
                assert not found[place, columns:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_every_format_and_tile_gives_the_product_and_the_same_bits(cupy, rng, type):
    from engine.cuda.matrix.gemm import Gemm
    from engine.cuda.matrix.gemm_plan import TILES
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    gemm = Gemm(TYPES, KernelActivation.NONE)
    shapes = [(200, 768), (1000, 2048)] + ([(48, 64), (17, 896)] if type.block_size < 256 else [])
    for rows, columns in shapes:
        raw = random_rows(rng, type, rows, columns)
        group = MatVec([packed(cupy, type, raw, columns)])
        x = rng.standard_normal((513, columns)).astype(np.float32)
        norm = rng.uniform(0.5, 1.5, columns).astype(np.float32)
        wide = x.astype(np.float64)
        normed = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * norm
        first = None
        for n in (513, 1, 16, 17, 65, 129, 300):
            a = operand(cupy, x[:n], norm)
            for tile in TILES:
                out = cupy.full((n, rows + 3), 9.0, np.float32)
                gemm(group, a, out[:, :rows], tile=tile)
                found = out.get()
                if first is None:
                    first = found[:, :rows]
                    assert nmse(first, normed, dequantize(raw, type).astype(np.float64)) < TOLERANCE
                np.testing.assert_array_equal(found[:, :rows], first[:n], err_msg=f"{n} rows, {tile}")
                assert (found[:, rows:] == 9.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_blocks_that_share_columns_give_the_product_and_the_same_bits_every_time(cupy, rng, type):
    from engine.cuda.matrix.gemm import Gemm
    from engine.cuda.matrix.gemm_plan import STEP_TILES
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    gemm = Gemm(TYPES, KernelActivation.NONE)
    rows, columns = 400, 2560
    raw = random_rows(rng, type, rows, columns)
    group = MatVec([packed(cupy, type, raw, columns)])
    x = rng.standard_normal((200, columns)).astype(np.float32)
    exact = dequantize(raw, type).astype(np.float64)
    bias = cupy.asarray(rng.standard_normal(rows).astype(np.float32))
    for tile in STEP_TILES:
        for n in (200, 65, 96, 129, 7):
            a = operand(cupy, x[:n])
            found = []
            for add in (False, False, True):
                out = cupy.full((n, rows + 3), 9.0, np.float32)
                gemm(group, a, out[:, :rows], bias=bias, add=add, tile=tile)
                found.append(out.get())
            assert nmse(found[0][:, :rows] - bias.get(), x[:n].astype(np.float64), exact) < TOLERANCE, tile
            np.testing.assert_array_equal(found[0], found[1], err_msg=f"{n} rows, {tile}")
            np.testing.assert_array_equal(found[0][:, :rows] + np.float32(9.0), found[2][:, :rows])
            assert (found[2][:, rows:] == 9.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("type", RARE, ids=lambda type: type.name)
def test_other_formats(cupy, rng, type):
    from engine.cuda.matrix.gemm import Gemm
    from engine.cuda.matrix.gemm_plan import TILES
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    rows, columns = 200, 768
    raw = random_rows(rng, type, rows, columns)
    gemm, group = Gemm(RARE, KernelActivation.NONE), MatVec([packed(cupy, type, raw, columns)])
    x = rng.standard_normal((300, columns)).astype(np.float32)
    results = []
    for n, tile in [(300, None), *((65, tile) for tile in TILES)]:
        results.append(cupy.zeros((n, rows), np.float32))
        gemm(group, operand(cupy, x[:n]), results[-1], tile=tile)
    whole = results[0].get()
    assert nmse(whole, x.astype(np.float64), dequantize(raw, type).astype(np.float64)) < TOLERANCE
    for found in results[1:]:
        np.testing.assert_array_equal(found.get(), whole[:65])


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [((512, 128, 128), 2048), ((96, 40), 14336)])
def test_a_row_has_the_same_bits_in_every_prompt(cupy, rng, rows, columns):
    from engine.cuda.matrix.gemm import Gemm
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    types = [GGMLType.Q4_K] * (len(rows) - 1) + [GGMLType.Q6_K]
    raws = [random_rows(rng, type, n, columns) for type, n in zip(types, rows, strict=True)]
    group = MatVec([packed(cupy, type, raw, columns) for type, raw in zip(types, raws, strict=True)])
    weights = np.concatenate([dequantize(raw, type) for type, raw in zip(types, raws, strict=True)]).astype(np.float64)
    gemm = Gemm(TYPES, KernelActivation.NONE)
    x = rng.standard_normal((max(ROWS), columns)).astype(np.float32)
    results = {}
    for n in ROWS:
        out = cupy.full((n, sum(rows)), 9.0, np.float32)
        gemm(group, operand(cupy, x[:n]), out)
        results[n] = out.get()
    last = results[max(ROWS)]
    assert nmse(last[:64], x[:64].astype(np.float64), weights) < TOLERANCE
    for n in ROWS:
        np.testing.assert_array_equal(results[n], last[:n], err_msg=str(n))
    moved = cupy.empty((700, sum(rows)), np.float32)
    gemm(group, operand(cupy, x[300:1000]), moved)
    np.testing.assert_array_equal(moved.get(), last[300:1000])


@pytest.mark.gpu
def test_bias_factor_and_residual(cupy, rng):
    from engine.cuda.matrix.gemm import Gemm
    from engine.cuda.matrix.gemm_plan import TILES
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    # Two widths of chunks: two launches.
    types, rows, columns = [GGMLType.Q5_0, GGMLType.Q4_K], [40, 72], 512
    raws = [random_rows(rng, type, n, columns) for type, n in zip(types, rows, strict=True)]
    group = MatVec([packed(cupy, type, raw, columns) for type, raw in zip(types, raws, strict=True)])
    gemm = Gemm(TYPES, KernelActivation.NONE)
    x, bias = rng.standard_normal((37, columns)).astype(np.float32), rng.standard_normal(112).astype(np.float32)
    plain, start = cupy.empty((37, 112), np.float32), rng.standard_normal((37, 112)).astype(np.float32)
    gemm(group, operand(cupy, x), plain)
    for tile in TILES:
        out = cupy.asarray(start)
        gemm(group, operand(cupy, x), out, bias=cupy.asarray(bias), alpha=0.5, add=True, tile=tile)
        np.testing.assert_allclose(out.get(), start + 0.5 * (plain.get() + bias), rtol=1e-5, atol=1e-6)


ACTIVATIONS = {
    1: lambda v: v / (1 + np.exp(-v)),
    2: lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    3: lambda v: np.maximum(v, 0),
    4: lambda v: np.maximum(v, 0) ** 2,
}


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_products_as_floats_and_as_the_next_operand(cupy, rng, activation):
    from engine.cuda.matrix.gemm import Gemm
    from engine.cuda.matrix.gemm_plan import TILES, operand_bytes
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    type, width, columns, n = GGMLType.Q4_K, 384, 512, 70
    gate, up = random_rows(rng, type, width, columns), random_rows(rng, type, width, columns)
    group = MatVec([packed(cupy, type, gate, columns, up)])
    gemm = Gemm([type], KernelActivation(activation))
    x = (rng.standard_normal((n, columns)) * 0.05).astype(np.float32)
    wide = x.astype(np.float64)
    truth = ACTIVATIONS[activation](wide @ dequantize(gate, type).T) * (wide @ dequantize(up, type).T)
    for tile in TILES:
        h = cupy.full((n, width), 9.0, np.float32)
        assert gemm.gated(group, operand(cupy, x), h, tile=tile) is None
        assert np.sum((h.get() - truth) ** 2) < 4e-6 * np.sum(truth**2)
        hidden = gemm.gated(group, operand(cupy, x), cupy.zeros(operand_bytes(n, width), cupy.uint8), tile=tile)
        same = operand(cupy, h.get())
        shape = (width // 64, same.pitch, 128)
        np.testing.assert_array_equal(hidden.data.get().reshape(shape)[:, :n], same.data.get().reshape(shape)[:, :n])


@pytest.mark.gpu
def test_dense_products_of_fixed_rows_do_not_depend_on_their_number(cupy, rng):
    from engine.cuda.matrix.dense import DenseProduct
    from engine.cuda.matrix.dense_plan import padded

    rows, columns = 96, 512
    raw = random_rows(rng, GGMLType.F32, rows, columns)
    matrix = packed(cupy, GGMLType.F32, raw, columns)
    dense = DenseProduct(fixed_rows=True)
    x = cupy.asarray(rng.standard_normal((512, columns)).astype(np.float32))
    results = []
    for n in (300, 1, 17, 256, 257):
        out = cupy.full((n, rows), 2.0, np.float32)
        dense(matrix, x[: padded(n)], out, rows=n, add=True)
        results.append(out.get())
    truth = x.get()[:300].astype(np.float64) @ raw.view(np.float32).reshape(rows, columns).T.astype(np.float64)
    np.testing.assert_allclose(results[0] - 2, truth, atol=1e-4)
    for found in results:
        np.testing.assert_array_equal(found, results[0][: len(found)])
