"""Packed matrix kernels: sizes and builds anywhere; on a GPU every format against float64 and numpy dequantization."""

import itertools

import numpy as np
import pytest

from engine.cuda.formats.layouts import LAYOUTS, kept_as, packed_bytes, tile_count
from engine.errors import DeviceError
from engine.gguf.quants import dequantize, row_bytes
from engine.gguf.types import GGMLType
from scripts.synthetic_models import list_tensors
from scripts.synthetic_shapes import SHAPES as SHAPES_BY_NAME
from tests.support.gpu.fake_runner import MULTIPROCESSORS
from tests.support.gpu.packed_rows import TYPES, nmse, packed, random_rows
from tests.support.models.gguf_builder import random_blocks

LEFT_OUT = {GGMLType.Q8_1: 4 / 40, GGMLType.Q8_K: 32 / 292}
"""What of a block stays in the file: sums of its numbers."""
SHAPES = [(1, 256), (33, 768), (257, 4352), (40, 14336)]
BATCHES = (8, 1, 2, 3, 4, 5, 7, 17)
# Inputs are 16-bit numbers, the largest of 32 being 32600: a squared error of 1/12 of (largest / 32600)^2 per term,
# 4e-10 of the square of normal inputs, a few times that with outliers and for a single output.
TOLERANCE = 1e-8


@pytest.mark.parametrize("type", TYPES)
def test_packed_takes_the_bytes_of_the_file(type):
    row = row_bytes(type, 4096) * (1 - LEFT_OUT.get(type, 0))
    assert packed_bytes(type, 4096, 4096) == 4096 * row
    assert packed_bytes(type, 4096, 4096, paired=True) == 2 * 4096 * row
    assert packed_bytes(type, 17, 4096) == 32 * row


def test_every_type_of_a_file_has_a_place_on_the_gpu():
    converted = {type for type in GGMLType if kept_as(type) is not type}
    assert converted == {GGMLType.F64, GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64}
    assert {kept_as(type) for type in GGMLType} == set(LAYOUTS)
    assert {kept_as(type) for type in converted} == {GGMLType.F32}


CARDS = [*MULTIPROCESSORS.items(), (75, 14), (86, 20), (87, 8), (89, 24), (100, 148), (120, 30)]
REAL_SHAPES = {
    one.shape for name in SHAPES_BY_NAME for one in list_tensors(SHAPES_BY_NAME[name]) if len(one.shape) == 2
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: "{} with {}".format(*card))
def test_every_product_has_a_block_on_every_card(card):
    """Sizes of the parts of shared memory as matvec.cu lays them out; the order of sums is the same for every batch."""
    from engine.cuda.driver.compiler import shared_limit
    from engine.cuda.formats.grid_tables import grid_bytes
    from engine.cuda.matrix.matvec_plan import SLAB, UNQUANTIZED, choose_block, max_batch, most_sequences

    arch, multiprocessors = card
    for type, (rows, columns) in itertools.product(TYPES, sorted(REAL_SHAPES)):
        tiles = tile_count(rows)
        most = most_sequences([type], tiles, columns, card)
        assert most == max_batch(arch) or columns > SLAB
        splits = set()
        for batch in sorted({1, min(2, most), min(3, most), most}):
            block = choose_block([type], tiles, columns, batch, card)
            warps, split, depth = block.tuning.warps, block.tuning.split, block.tuning.depth
            sequences = {1: 1, 2: 2, 3: 4, 4: 4}.get(batch, 8)
            teams, slot = warps // split, -(-LAYOUTS[type].chunk_bytes // 16) * 16
            kept = 0 if columns <= SLAB else 1 if block.resident else -(-tiles // (min(multiprocessors, tiles) * teams))
            needed = (
                (1024 * warps if sequences >= 4 else 0)
                + warps * depth * (slot + 8)
                + warps * 2 * sequences * 64
                + split * 4 * sequences * 4
            )
            quads = -(-columns // 128) if block.resident else SLAB // 128
            needed += quads * sequences * (528 if type in UNQUANTIZED else 320 if sequences >= 4 else 304)
            needed += teams * sequences * 64 * (1 + kept)
            assert needed <= block.shared_bytes <= shared_limit(arch) - 1024 - grid_bytes([type])
            splits.add(split)
        assert len(splits) == 1


def test_operands_fit_the_blocks_of_three_and_four_sequences():
    """Two slabs of the input in shared memory, the same order of sums as blocks that convert their input themselves."""
    from engine.cuda.driver.compiler import shared_limit
    from engine.cuda.matrix.matvec_plan import UNQUANTIZED, choose_block, operand_block

    card = (90, 132)
    for type, (rows, columns) in itertools.product((GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0), sorted(REAL_SHAPES)):
        tiles = tile_count(rows)
        block = operand_block([type], tiles, columns, 4, card)
        assert (operand_block([type], tiles, columns, 2, card) is None) == (block is None or columns <= 4096)
        if block is not None:
            assert block.tuning.split == choose_block([type], tiles, columns, 4, card).tuning.split
            assert block.shared_bytes <= shared_limit(90) - 1024
    assert operand_block([GGMLType.Q4_K], 256, 14336, 4, card) is not None
    assert operand_block([GGMLType.Q4_K], 256, 4096, 1, card) is None
    assert operand_block([GGMLType.Q4_K], 256, 4096, 4, (80, 108)) is None
    assert all(operand_block([type], 256, 4096, 4, card) is None for type in UNQUANTIZED)


@pytest.mark.gpu
@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q3_K, GGMLType.Q8_0, GGMLType.IQ4_XS])
@pytest.mark.parametrize(("rows", "columns"), [(33, 512), (257, 4352), (48, 14336)])
def test_a_converted_input_changes_no_bits(cupy, rng, type, rows, columns):
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.matrix.matvec_plan import operand_bytes

    matrix = packed(cupy, type, random_rows(rng, type, rows, columns), columns)
    x = cupy.asarray(rng.standard_normal((4, columns)).astype(np.float32))
    norm = cupy.asarray(rng.uniform(0.5, 1.5, columns).astype(np.float32))
    operand = cupy.empty(operand_bytes(columns), np.uint8)
    for more in ({"norm": norm, "eps": 1e-5}, {"add": True, "alpha": 0.5}):
        single = cupy.ones((4, rows), np.float32)
        for b in range(4):
            MatVec([matrix])(x[b : b + 1], single[b : b + 1], **more)
        for batch in (2, 3, 4):
            out = cupy.ones((batch, rows), np.float32)
            MatVec([matrix])(x[:batch], out, operand=operand, **more)
            np.testing.assert_array_equal(out.get(), single[:batch].get())


def test_a_product_beyond_every_block_says_so():
    from engine.cuda.matrix.matvec_plan import most_sequences

    with pytest.raises(
        DeviceError, match=r"1600000 rows and 65536 columns \(F32\) does not fit .* capability 7\.5, 14 mul"
    ):
        most_sequences([GGMLType.F32], 100000, 65536, (75, 14))


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


@pytest.fixture(scope="module")
def kernels(cupy):
    """Builds what the tests of every type need side by side; one after the other would take minutes."""
    from engine.cuda.driver import compiler
    from engine.cuda.formats import dequant, repack
    from engine.cuda.matrix.matvec_plan import kernel_job
    from engine.cuda.rows.activation import KernelActivation

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    card = compiler.device_arch(), int(properties["multiProcessorCount"])
    jobs = [job for type in TYPES for job in (repack.build_job(type), *dequant.build_jobs(type))]
    for type in TYPES:
        jobs += [kernel_job([type], tile_count(n), k, batch, card)[0] for n, k in SHAPES for batch in (1, 2, 4, 8)]
        jobs += [kernel_job([type], 6, 512, 3, card, paired=True, activation=KernelActivation.SILU)[0]]
    compiler.prebuild(list({repr(job): job for job in jobs}.values()), card[0])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_unpacked_rows_equal_numpy(cupy, kernels, rng, type, rows):
    from engine.cuda.formats.dequant import dequantize as unpack
    from engine.cuda.formats.dequant import embed

    columns = {256: 512, 128: 384, 64: 448}.get(type.block_size, 416)
    raw = random_rows(rng, type, rows, columns)
    truth = dequantize(raw, type)
    matrix = packed(cupy, type, raw, columns)
    whole, half = cupy.empty((rows, columns), np.float32), cupy.empty((rows, columns), np.float16)
    unpack(matrix, whole)
    unpack(matrix, half)
    ids = np.array([rows - 1, 0, -1], np.int32)
    taken = cupy.empty((3, columns), np.float32)
    embed(matrix, cupy.asarray(ids), taken, scale=2.0)
    atol = 2.0**-21 * np.abs(truth).max() if type == GGMLType.F32 else 0.0
    np.testing.assert_allclose(whole.get(), truth, rtol=0, atol=atol)
    np.testing.assert_allclose(taken.get()[:2], 2 * truth[[rows - 1, 0]], rtol=0, atol=2 * atol)
    assert not taken.get()[2].any()
    np.testing.assert_allclose(half.get(), truth.astype(np.float16), rtol=2.0**-10 if atol else 0, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("type", [type for type in GGMLType if kept_as(type) is not type])
def test_plain_numbers_of_other_kinds_become_float32(cupy, type):
    from engine.cuda.formats.dequant import dequantize as unpack
    from engine.cuda.load.uploader import Uploader
    from engine.model.weights import Weight

    raw = random_blocks((33, 96), type, std=30.0)
    uploader = Uploader(cupy.cuda.get_current_stream(), lambda done: None)
    matrix = uploader.matrix(Weight("w", type, (33, 96), raw))
    out = cupy.empty((33, 96), np.float32)
    unpack(matrix, out)
    truth = dequantize(raw, type)
    np.testing.assert_allclose(out.get(), truth, rtol=0, atol=2.0**-21 * np.abs(truth).max())


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_product_of_every_format(cupy, kernels, rng, type, rows, columns):
    from engine.cuda.matrix.matvec import MatVec

    raw = random_rows(rng, type, rows, columns)
    weights = dequantize(raw, type).astype(np.float64)
    product = MatVec([packed(cupy, type, raw, columns)])
    x = (rng.standard_normal((17, columns)) * np.exp(rng.standard_normal((17, columns)))).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, columns).astype(np.float32)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * norm
    first = None
    for batch in BATCHES:
        out = cupy.full((batch, rows), 9.0, np.float32)
        product(cupy.asarray(x[:batch]), out, norm=cupy.asarray(norm), eps=1e-5)
        assert nmse(out.get(), normed[:batch], weights) < TOLERANCE
        first = out.get() if first is None else first
        assert np.array_equal(out.get()[:8], first[:batch])
        product(cupy.asarray(x[:batch]), out, norm=cupy.asarray(norm), eps=1e-5, add=True)
        np.testing.assert_allclose(out.get()[:8], 2 * first[:batch], rtol=1e-6, atol=1e-30)


@pytest.mark.gpu
def test_group_of_types_with_bias_and_large_inputs(cupy, rng):
    from engine.cuda.matrix.matvec import MatVec

    columns, parts = 1024, ((GGMLType.Q4_K, 48), (GGMLType.Q8_0, 17), (GGMLType.Q6_K, 30))
    raws = [random_rows(rng, type, rows, columns) for type, rows in parts]
    weights = np.concatenate([dequantize(raw, type) for raw, (type, _) in zip(raws, parts, strict=True)])
    product = MatVec([packed(cupy, type, raw, columns) for raw, (type, _) in zip(raws, parts, strict=True)])
    bias = rng.integers(-3, 4, 95).astype(np.float32)
    for magnitude in (1e-6, 1.0, 1e7):
        x = (rng.standard_normal((2, columns)) * magnitude).astype(np.float32)
        out = cupy.empty((2, 95), np.float32)
        product(cupy.asarray(x), out, bias=cupy.asarray(bias * magnitude), alpha=0.5)
        found = out.get().astype(np.float64) - 0.5 * magnitude * bias
        assert nmse(found, x.astype(np.float64), weights.astype(np.float64), 0.5) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows", [8, 41])
def test_gate_and_up_in_one(cupy, kernels, rng, type, rows):
    from engine.cuda.formats.dequant import dequantize as unpack
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.rows.activation import KernelActivation

    columns = 512
    gate, up = random_rows(rng, type, rows, columns), random_rows(rng, type, rows, columns)
    pair = packed(cupy, type, gate, columns, partner=up)
    x = (rng.standard_normal((3, columns)) * 0.1).astype(np.float32)
    out = cupy.empty((3, rows), np.float32)
    MatVec([pair])(cupy.asarray(x), out, activation=KernelActivation.SILU)
    g, u = (x.astype(np.float64) @ dequantize(raw, type).astype(np.float64).T for raw in (gate, up))
    truth = g * 0.5 * (1 + np.tanh(g / 2)) * u
    assert np.sum((out.get() - truth) ** 2) < 1e-7 * np.sum(truth**2)
    both = cupy.empty((2, rows, columns), np.float32)
    unpack(pair, both)
    truth = np.stack([dequantize(gate, type), dequantize(up, type)])
    np.testing.assert_allclose(both.get(), truth, rtol=0, atol=1e-6 if type == GGMLType.F32 else 0)


@pytest.mark.gpu
def test_forced_block_shapes_agree(cupy, rng):
    from engine.cuda.matrix.matvec import MatVec
    from engine.cuda.matrix.matvec_plan import Tuning

    raw = random_rows(rng, GGMLType.Q4_K, 600, 4096)
    matrix = packed(cupy, GGMLType.Q4_K, raw, 4096)
    x = rng.standard_normal((1, 4096)).astype(np.float32)
    weights = dequantize(raw, GGMLType.Q4_K).astype(np.float64)
    for shape in ((16, 8, 2), (16, 4, 2), (16, 16, 2), (8, 8, 3), (4, 4, 1), (2, 2, 1)):
        out = cupy.empty((1, 600), np.float32)
        MatVec([matrix], tuning=Tuning(*shape))(cupy.asarray(x), out)
        assert nmse(out.get(), x.astype(np.float64), weights) < TOLERANCE


@pytest.mark.gpu
def test_group_of_quantized_and_plain_matrices(cupy, rng):
    from engine.cuda.matrix.matvec import MatVec

    columns, parts = 512, ((GGMLType.Q4_K, 20), (GGMLType.F16, 17), (GGMLType.BF16, 9), (GGMLType.Q6_K, 30))
    raws = [random_rows(rng, type, rows, columns) for type, rows in parts]
    weights = np.concatenate([dequantize(raw, type) for raw, (type, _) in zip(raws, parts, strict=True)])
    product = MatVec([packed(cupy, type, raw, columns) for raw, (type, _) in zip(raws, parts, strict=True)])
    x = rng.standard_normal((3, columns)).astype(np.float32)
    out = cupy.empty((3, 76), np.float32)
    product(cupy.asarray(x), out)
    assert nmse(out.get(), x.astype(np.float64), weights.astype(np.float64)) < TOLERANCE
