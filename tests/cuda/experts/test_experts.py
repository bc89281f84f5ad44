"""Experts of many rows: scratch memory anywhere; on a Hopper GPU places, products against float64, and equal bits."""

import numpy as np
import pytest

from engine.cuda.experts.prefill import can_stack, expert_tile, room_bytes
from engine.cuda.experts.router import KernelRouting
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import dequantize
from engine.gguf.types import GGMLType
from tests.support.gpu.expert_reference import TOLERANCE, WORST_ROW, routed, silu
from tests.support.gpu.helpers import hopper_cupy
from tests.support.gpu.packed_rows import packed, random_rows

Q4, Q6, Q8, F16 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16


def test_room_never_shrinks():
    routing = KernelRouting(128, 8)
    sizes = [room_bytes(rows, routing, 768, 2048) for rows in range(1, 2500, 7)]
    assert sizes == sorted(sizes)
    assert {expert_tile(rows, routing).tokens for rows in (1, 256, 512, 2048)} == {16, 32, 64, 128}
    assert can_stack(768, 2048, 128)
    assert not can_stack(704, 2048, 128)


@pytest.fixture(scope="module")
def cupy():
    return hopper_cupy()


@pytest.fixture
def rng():
    return np.random.default_rng(12)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("pairs", "experts", "tile"), [(1, 1, 16), (7, 5, 16), (255, 16, 64), (4096, 128, 64), (16384, 256, 128)]
)
def test_places(cupy, rng, pairs, experts, tile):
    from engine.cuda.driver.compiler import build
    from engine.cuda.driver.launch import launch

    ids = rng.integers(0, experts, pairs).astype(np.int32)
    ids[rng.random(pairs) < 0.1] = -1
    places = cupy.full(pairs, 77, np.int32)
    table = cupy.full(1 + pairs // tile + experts, 77, np.int32)
    kernel = build(("experts.cu",), defines={}).get("group_rows")
    launch(kernel, experts, 256, (cupy.asarray(ids), pairs, tile, table, places))
    tiles = [-(-int((ids == e).sum()) // tile) for e in range(experts)]
    expected = np.full(pairs, -1, np.int32)
    for e in range(experts):
        mine = np.flatnonzero(ids == e)
        expected[mine] = sum(tiles[:e]) * tile + np.arange(len(mine))
    np.testing.assert_array_equal(places.get(), expected)
    found = table.get()
    assert found[0] == sum(tiles)
    np.testing.assert_array_equal(found[1 : 1 + sum(tiles)], np.repeat(np.arange(experts), tiles))


class Mixture:
    """Random experts on the device and in float64."""

    experts, used, width, columns = 12, 3, 256, 512

    def __init__(self, cupy, rng, types, *, weigh_input=False, routing=None):
        from engine.cuda.experts.prefill import StackedExperts
        from engine.cuda.matrix.gemm import Gemm
        from engine.cuda.matrix.matvec import MatVec

        e, f, d = self.experts, self.width, self.columns
        shapes = ((types[0], f, d), (types[0], f, d), (types[1], d, f))
        raw = [random_rows(rng, type, e * n, k) for type, n, k in shapes]
        self.gate, self.up, self.down = (
            dequantize(r.reshape(-1), type).astype(np.float64).reshape(e, n, k)
            for r, (type, n, k) in zip(raw, shapes, strict=True)
        )
        gate_up = MatVec([packed(cupy, types[0], raw[0], d, partner=raw[1])])
        self.routing = routing or KernelRouting(e, self.used)
        assert e == self.routing.n_stacked
        down = MatVec([packed(cupy, types[1], raw[2], f)])
        self.stacked = StackedExperts(gate_up, down, self.routing, None, weigh_input)
        self.gemm = Gemm(sorted(set(types), key=lambda type: type.value), KernelActivation.SILU)
        self.cupy = cupy

    def run(self, x, scores, norm, positions=None):
        from engine.cuda.experts import prefill as experts

        size = max(room_bytes(len(x), self.routing, self.width, self.columns), 1024)
        room = self.cupy.full(size, 255, np.uint8)  # not-a-numbers where nothing is written
        out = self.cupy.asarray(x)
        norm = self.cupy.asarray(norm)
        experts.run(
            self.stacked, self.gemm, out, self.cupy.asarray(scores), room, norm=norm, eps=1e-6, positions=positions
        )
        return out.get()

    def inputs(self, rng, rows):
        x = rng.standard_normal((rows, self.columns)).astype(np.float32)
        return x, rng.standard_normal((rows, self.routing.n_scores)).astype(np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("types", [(Q4, Q6), (Q6, Q4), (Q8, Q8), (F16, Q8)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33, 90, 200, 1100])
def test_experts_against_float64(cupy, rng, types, rows):
    check_mixture(Mixture(cupy, rng, types), rng, rows)


@pytest.mark.gpu
def test_weights_on_inputs(cupy, rng):
    check_mixture(Mixture(cupy, rng, (Q4, Q6), weigh_input=True), rng, 33)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 1100])
def test_experts_of_every_row(cupy, rng, rows):
    routing = KernelRouting(10, 3, n_shared=2, shared_scored=True, shared_scale=0.7)
    check_mixture(Mixture(cupy, rng, (Q4, Q6), routing=routing), rng, rows)


def check_mixture(mixture, rng, rows):
    x, scores = mixture.inputs(rng, rows)
    scores[: rows // 3] = scores[0]  # some experts have many rows
    # Hidden vectors travel as float16: gates of about 2, whatever the weights.
    norm = (rng.standard_normal(mixture.columns) * 2 / mixture.gate.std() / mixture.columns**0.5).astype(np.float32)
    ids, weights = routed(mixture.routing, scores)
    n = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6) * norm
    added = np.zeros(x.shape)
    for e in range(mixture.experts):
        row, u = np.nonzero(ids == e)
        weight = weights[row, u][:, None]
        read, given = (weight, 1.0) if mixture.stacked.weigh_input else (1.0, weight)
        hidden = silu(read * n[row] @ mixture.gate[e].T) * (read * n[row] @ mixture.up[e].T)
        np.add.at(added, row, given * (hidden @ mixture.down[e].T))
    found = mixture.run(x, scores, norm) - x.astype(np.float64)
    errors = ((found - added) ** 2).sum(1) / (added**2).sum(1)
    assert errors.mean() < TOLERANCE, errors.mean()
    assert errors.max() < WORST_ROW, errors.max()


@pytest.mark.gpu
def test_a_row_has_the_same_bits_among_any_others(cupy, rng):
    mixture = Mixture(cupy, rng, (Q4, Q6))
    x, scores = mixture.inputs(rng, 1500)
    norm = np.full(mixture.columns, 0.01, np.float32)
    whole = mixture.run(x, scores, norm)
    for pick in (slice(0, 1), slice(7, 24), slice(3, 1503, 5), slice(None, None, -1)):
        np.testing.assert_array_equal(mixture.run(x[pick], scores[pick], norm), whole[pick])


@pytest.mark.gpu
def test_inactive_rows_are_left_alone(cupy, rng):
    mixture = Mixture(cupy, rng, (Q4, Q6))
    x, scores = mixture.inputs(rng, 40)
    norm = np.full(mixture.columns, 0.01, np.float32)
    active = rng.random(40) < 0.6
    positions = cupy.asarray(np.where(active, 5, -1).astype(np.int32))
    expected = np.where(active[:, None], mixture.run(x, scores, norm), x)
    np.testing.assert_array_equal(mixture.run(x, scores, norm, positions), expected)
