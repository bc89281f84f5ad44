"""Products with float32 matrices: against float64, and the same bits for every shape of a block and number of rows.

The same tests run the kernel compiled for the CPU (small shapes, thread by thread) and on a GPU.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.cuda.driver.compiler import shared_limit
from engine.cuda.experts import router
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix import float_gemm
from engine.cuda.matrix.float_gemm import SHAPES, choose_shape, float_job, multiply
from engine.cuda.matrix.linear import MatrixGroup
from engine.gguf.types import GGMLType
from tests.support.gpu.host_kernels import HostKernels, Memory
from tests.support.gpu.packed_rows import packed

TOLERANCE = 2e-6
"""Of the largest value expected: two parts of 11 bits, and sums of tensor cores, which are cut off."""

EPS, ALPHA = 1e-5, 0.75
KINDS = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


class HostRows(np.ndarray):
    """An array that says where it is as CuPy's do."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernel of every shape, compiled for the CPU."""
    return HostKernels(tmp_path_factory.mktemp("host"), [float_job(shape, 90) for shape in SHAPES])


@pytest.fixture
def memory(request, monkeypatch):
    """Where the arrays are; on the CPU the launcher runs the compiled kernels."""
    if request.param == "host":
        request.getfixturevalue("host").install(monkeypatch, float_gemm)
        monkeypatch.setattr(float_gemm, "_card", lambda: (90, 132))
    return Memory(request.param)


def up(memory, array):
    """A copy for the kernels."""
    found = memory.up(array)
    return found.view(HostRows) if memory.kind == "host" else found


def packed_floats(memory, weights, partner=None):
    """A packed matrix, made by numpy as formats.cuh draws it: halfs of the first 11 bits and of what they leave."""
    rows, columns = weights.shape
    parts = [weights] if partner is None else [weights, partner]
    _, exponent = np.frexp(max(np.abs(part).max() for part in parts))
    factor = np.float32(2.0 ** (15 - exponent))
    height, chunks = 16 // len(parts), -(-columns // 128)
    tiles = -(-rows // height)
    whole = np.zeros((tiles, len(parts), height, chunks * 128), np.float32)
    for i, part in enumerate(parts):
        padded = np.zeros((tiles * height, chunks * 128), np.float32)
        padded[:rows, :columns] = part * factor
        whole[:, i] = padded.reshape(tiles, height, -1)
    high = whole.astype(np.float16)
    pair = np.stack([high, (whole - high.astype(np.float32)).astype(np.float16)])
    # (part, tile, row of the lane, g, chunk, group, t, half, i) in the order of memory
    pair = pair.reshape(2, tiles, 2, 8, chunks, 8, 4, 2, 2).transpose(1, 4, 5, 0, 3, 6, 7, 2, 8)
    data = up(memory, np.ascontiguousarray(pair).reshape(-1).view(np.uint8))
    scale = up(memory, np.array([1 / factor, factor], np.float32))
    return PackedMatrix(GGMLType.F32, rows, columns, data, scale, partner is not None)


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def normed(x, weight):
    """RMSNorm(x) * weight in float64."""
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + EPS) * weight


def check(found, expected):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("memory", KINDS, indirect=True)
@pytest.mark.parametrize("columns", [200, 130, 64, 2200])  # 130: rows do not begin at multiples of 16 bytes
def test_products_match_float64_and_have_the_same_bits_for_every_shape(memory, columns):
    rng = np.random.default_rng(columns)
    heights = (17, 1, 40)
    weights = [floats(rng, n, columns) * 0.05 for n in heights]
    group = MatrixGroup([packed_floats(memory, one) for one in weights])
    x, norm, bias, before = floats(rng, 70, columns), floats(rng, columns), floats(rng, 58), floats(rng, 70, 60)
    on_card = [up(memory, array) for array in (x, norm, bias)]
    expected = before.astype(np.float64)
    expected[:, :58] += ALPHA * (normed(x, norm) @ np.concatenate(weights).T + bias)
    results = []
    for shape in SHAPES:
        for rows in (70, 1, 16, 33) if shape.few or memory.kind == "gpu" else (70,):
            out = up(memory, before)
            given = on_card[0][:rows]
            options = {"norm": on_card[1], "eps": EPS, "bias": on_card[2], "alpha": ALPHA, "add": True}
            multiply(group, given, out, **options, shape=shape)
            found = memory.down(out)
            np.testing.assert_array_equal(found[rows:], before[rows:])
            np.testing.assert_array_equal(found[:, 58:], before[:, 58:])
            results.append(found[:rows])
    check(results[0], expected)
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0][: len(found)])


@pytest.mark.parametrize("memory", KINDS, indirect=True)
def test_gate_and_up_of_a_paired_matrix_go_apart(memory):
    rng = np.random.default_rng(5)
    gate, up_weights, x = floats(rng, 21, 96), floats(rng, 21, 96), floats(rng, 9, 96)
    group = MatrixGroup([packed_floats(memory, gate, up_weights)])
    first, second = (up(memory, np.full((9, 21), np.nan, np.float32)) for _ in range(2))
    multiply(group, up(memory, x), first, second=second)
    check(memory.down(first), x.astype(np.float64) @ gate.T)
    check(memory.down(second), x.astype(np.float64) @ up_weights.T)


@pytest.mark.parametrize("memory", KINDS, indirect=True)
def test_a_row_without_numbers_spoils_no_other(memory):
    rng = np.random.default_rng(6)
    group, x = MatrixGroup([packed_floats(memory, floats(rng, 20, 128))]), floats(rng, 20, 128)
    clean, spoilt = (up(memory, np.zeros((20, 20), np.float32)) for _ in range(2))
    multiply(group, up(memory, x), clean)
    x[3, 100], x[8, 5] = np.inf, np.nan
    multiply(group, up(memory, x), spoilt)
    clean, spoilt = memory.down(clean), memory.down(spoilt)
    assert not np.isfinite(spoilt[[3, 8]]).any()
    kept = [n for n in range(20) if n not in (3, 8)]
    np.testing.assert_array_equal(spoilt[kept], clean[kept])


def test_the_shape_goes_by_rounds_over_the_card():
    def chosen(outputs, rows, card=(90, 132)):
        shape = choose_shape(-(-outputs // 16), rows, card)
        return shape.tiles, shape.rows

    assert [chosen(n, 2048) for n in (256, 128, 64, 32, 1)] == [(4, 32), (4, 16), (4, 16), (1, 16), (1, 16)]
    assert [chosen(n, 512) for n in (257, 256, 128, 64)] == [(4, 16), (4, 16), (1, 16), (1, 16)]
    assert [chosen(n, 4) for n in (256, 1)] == [(1, 16)] * 2
    assert chosen(4096, 2048) == (4, 32)
    for arch in (80, 86, 89, 90, 120):
        for shape in (choose_shape(16, rows, (arch, 84)) for rows in (1, 512, 2048)):
            assert shape.shared_bytes(arch) <= shared_limit(arch) - 1024


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [2048, 8192])
def test_long_sums_on_a_card(columns):
    """Packed by the engine's own kernel; values of one sign, whose sums tensor cores would make too small."""
    import cupy

    rng, rows = np.random.default_rng(7), 257
    weights = np.abs(floats(rng, rows, columns)) * np.float32(0.02)
    matrix = packed(cupy, GGMLType.F32, weights.view(np.uint8).reshape(rows, -1), columns)
    made = packed_floats(Memory("gpu"), weights)
    np.testing.assert_array_equal(matrix.data.get(), made.data.get())
    np.testing.assert_array_equal(matrix.scale.get(), made.scale.get())
    group = MatrixGroup([matrix])
    for x in (np.abs(floats(rng, 300, columns)), floats(rng, 300, columns)):
        expected = x.astype(np.float64) @ weights.T.astype(np.float64)
        results = []
        for shape in (None, *SHAPES):
            out = cupy.full((300, rows), np.nan, np.float32)
            multiply(group, cupy.asarray(x), out, shape=shape)
            results.append(out.get())
        check(results[0], expected)
        for found in results[1:]:
            np.testing.assert_array_equal(found, results[0])


@pytest.mark.parametrize(("experts", "rows", "columns"), [(20, 11, 512), (33, 9, 2304), (17, 3, 200)])
def test_routers_multiply_rows_together(tmp_path, monkeypatch, experts, rows, columns):
    """On the CPU; tests/cuda/experts/test_moe.py has the same for a GPU.

    Blocks of few and of many warps have the same bits.
    """
    HostKernels(tmp_path, [router.router_job(GGMLType.F32, 90)]).install(monkeypatch, router)
    monkeypatch.setattr(router, "device_arch", lambda: 90)
    memory, rng = Memory("host"), np.random.default_rng(experts)
    weights, x, norm = floats(rng, experts, columns) * 0.05, floats(rng, rows, columns), floats(rng, columns)
    bias = floats(rng, experts)
    matrix, given = packed_floats(memory, weights), [up(memory, array) for array in (x, norm, bias)]
    found = []
    for card in (1, 1000):
        monkeypatch.setattr(router, "_multiprocessors", lambda card=card: card)
        found.append(up(memory, np.full((rows, experts), np.nan, np.float32)))
        options = {"norm": given[1], "eps": EPS, "bias": given[2], "alpha": ALPHA, "together": True}
        router.score_experts(matrix, given[0], found[-1], **options)
    check(memory.down(found[0]), ALPHA * (normed(x, norm) @ weights.T + bias))
    np.testing.assert_array_equal(*found)
