"""Rows that share experts: scratch memory anywhere; on a Hopper GPU products against float64, and equal bits."""

import numpy as np
import pytest

from engine.cuda.experts.moe_rows import GROUP, MAX_ROWS, can_share, room_bytes
from engine.cuda.experts.router import Gating, KernelRouting
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import dequantize
from engine.gguf.types import GGMLType
from tests.support.gpu.expert_reference import TOLERANCE, WORST_ROW, routed, silu
from tests.support.gpu.helpers import hopper_cupy
from tests.support.gpu.packed_rows import packed, random_rows

Q4, Q6, Q8, F16, BF16 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16, GGMLType.BF16
SERVED = [type for type in LAYOUTS if type is not GGMLType.F32]


def test_what_is_served():
    assert can_share(Q4, Q6, 768, 2048, 90)
    assert not can_share(Q4, Q6, 768, 2048, 80)
    assert not can_share(Q8, Q8, 96, 2048, 90)
    assert not can_share(GGMLType.F32, Q8, 256, 2048, 90)


def test_room_grows_up_to_one_turn():
    routing = KernelRouting(128, 8)
    sizes = [room_bytes(rows, routing, 768, 2048) for rows in range(1, 2 * MAX_ROWS)]
    assert sizes == sorted(sizes)
    assert sizes[MAX_ROWS - 1] == sizes[-1]
    # Every expert may have one pair more than whole groups.
    assert sizes[-1] >= (MAX_ROWS * 8 + (GROUP - 1) * 128) * 4 * 2048


@pytest.fixture(scope="module")
def cupy():
    return hopper_cupy()


@pytest.fixture
def rng():
    return np.random.default_rng(13)


class Mixture:
    """Random experts on the device and in float64."""

    def __init__(
        self,
        cupy,
        rng,
        types,
        *,
        size=(12, 3, 256, 512),
        biased=False,
        routing=None,
        activation=KernelActivation.SILU,
        **options,
    ):
        from engine.cuda.experts.moe_rows import RowExperts

        e, used, f, d = self.size = size
        self.routing = routing or KernelRouting(e, used)
        assert e == self.routing.n_stacked
        shapes = ((types[0], f, d), (types[0], f, d), (types[1], d, f))
        raw = [random_rows(rng, type, e * n, k) for type, n, k in shapes]
        self.gate, self.up, self.down = (
            dequantize(r.reshape(-1), type).astype(np.float64).reshape(e, n, k)
            for r, (type, n, k) in zip(raw, shapes, strict=True)
        )
        self.biases = [rng.standard_normal((e, n)).astype(np.float32) * biased for n in (f, f, d)]
        if biased:
            names = ("gate_bias", "up_bias", "down_bias")
            options |= dict(zip(names, map(cupy.asarray, self.biases), strict=True))
        self.products = RowExperts(
            packed(cupy, types[0], raw[0], d, partner=raw[1]), packed(cupy, types[1], raw[2], f), self.routing,
            activation, **options,
        )  # fmt: skip
        self.cupy = cupy

    def run(self, x, scores, norm=None, positions=None, emitted=None):
        _, _, f, d = self.size
        room = self.cupy.full(room_bytes(len(x), self.routing, f, d), 255, np.uint8)  # not-a-numbers
        out = self.cupy.asarray(x)
        norm = None if norm is None else self.cupy.asarray(norm)
        self.products(out, self.cupy.asarray(scores), room, out, norm=norm, eps=1e-6, positions=positions,
                      emitted=emitted)  # fmt: skip
        return out.get()

    def inputs(self, rng, rows):
        x = rng.standard_normal((rows, self.size[3])).astype(np.float32)
        return x, rng.standard_normal((rows, self.routing.n_scores)).astype(np.float32)

    def norm(self, rng):
        """A weight that makes gates of about 2, whatever the experts' weights: hidden vectors travel as float16."""
        columns = self.size[3]
        return (rng.standard_normal(columns) * 2 / self.gate.std() / columns**0.5).astype(np.float32)

    def expected(self, x, scores, norm, *, weigh_input=False, gated=lambda gate, up: silu(gate) * up):
        """What is added to x."""
        ids, weights = routed(self.routing, scores)
        n = x.astype(np.float64)
        if norm is not None:
            n = n / np.sqrt((n**2).mean(1, keepdims=True) + 1e-6) * norm
        added = np.zeros(x.shape)
        for e in range(self.size[0]):
            row, u = np.nonzero(ids == e)
            w = weights[row, u][:, None]
            source = n[row] * w if weigh_input else n[row]
            hidden = gated(source @ self.gate[e].T + self.biases[0][e], source @ self.up[e].T + self.biases[1][e])
            result = hidden @ self.down[e].T + self.biases[2][e]
            np.add.at(added, row, result if weigh_input else result * w)
        return added

    def check(self, x, scores, norm, **options):
        added = self.expected(x, scores, norm, **options)
        found = self.run(x, scores, norm) - x.astype(np.float64)
        errors = ((found - added) ** 2).sum(1) / (added**2).sum(1)
        assert errors.mean() < TOLERANCE, errors.mean()
        assert errors.max() < WORST_ROW, errors.max()


@pytest.fixture(scope="module")
def kernels(cupy):
    """Builds what the test of every type needs side by side."""
    from engine.cuda.driver import compiler
    from engine.cuda.experts import moe_rows
    from engine.cuda.formats import repack

    jobs = [repack.build_job(type) for type in LAYOUTS]
    for type in SERVED:
        jobs += moe_rows.build_jobs(type, type, KernelActivation.SILU, KernelRouting(12, 3), 256, 512)
    compiler.prebuild(list({repr(job): job for job in jobs}.values()), compiler.device_arch())


@pytest.mark.gpu
@pytest.mark.parametrize("type", SERVED)
def test_every_type_against_float64(cupy, kernels, rng, type):
    mixture = Mixture(cupy, rng, (type, type))
    mixture.check(*mixture.inputs(rng, 21), mixture.norm(rng))


@pytest.mark.gpu
@pytest.mark.parametrize("types", [(Q4, Q6), (Q6, Q4), (F16, Q8)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9, 33, 64, 65, 150, 256])
def test_experts_against_float64(cupy, rng, types, rows):
    mixture = Mixture(cupy, rng, types)
    x, scores = mixture.inputs(rng, rows)
    scores[: rows // 3] = scores[0]  # some experts have many rows
    mixture.check(x, scores, mixture.norm(rng))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "type"),
    [
        ((1, 1, 512, 256), Q4),
        ((3, 3, 256, 5120), Q4),
        ((2, 1, 9216, 256), Q4),
        ((300, 32, 256, 256), Q4),
        ((12, 3, 384, 640), Q8),
    ],
    ids=str,
)
def test_sizes(cupy, rng, size, type):
    mixture = Mixture(cupy, rng, (type, type), size=size)
    mixture.check(*mixture.inputs(rng, 40), mixture.norm(rng))


@pytest.mark.gpu
@pytest.mark.parametrize("weigh_input", [False, True])
def test_biases_and_weighted_inputs(cupy, rng, weigh_input):
    routing = KernelRouting(16, 4, Gating.SIGMOID, groups=4, groups_used=2, weight_scale=1.5)
    mixture = Mixture(
        cupy, rng, (Q8, Q8), size=(16, 4, 256, 512), biased=True, routing=routing, weigh_input=weigh_input
    )
    mixture.check(*mixture.inputs(rng, 19), mixture.norm(rng), weigh_input=weigh_input)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 64])
def test_experts_of_every_row(cupy, rng, rows):
    routing = KernelRouting(10, 3, n_shared=2, shared_scored=True, shared_scale=0.7)
    mixture = Mixture(cupy, rng, (Q4, Q6), routing=routing)
    mixture.check(*mixture.inputs(rng, rows), mixture.norm(rng))


@pytest.mark.gpu
def test_clamped_halves_without_a_norm(cupy, rng):
    def bent(gate, up):
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)

    mixture = Mixture(cupy, rng, (BF16, BF16), biased=True, activation=KernelActivation.SWIGLU_CLAMPED)
    x, scores = mixture.inputs(rng, 19)
    mixture.check((x * 2 / mixture.gate.std() / 512**0.5).astype(np.float32), scores, None, gated=bent)


@pytest.mark.gpu
@pytest.mark.parametrize("types", [(Q4, Q6), (Q8, F16)], ids=str)
def test_a_row_has_the_same_bits_among_any_others(cupy, rng, types):
    mixture = Mixture(cupy, rng, types)
    x, scores = mixture.inputs(rng, 150)
    norm = mixture.norm(rng)
    whole = mixture.run(x, scores, norm)
    for pick in (slice(0, 1), slice(7, 24), slice(3, 150, 5), slice(None, None, -1)):
        np.testing.assert_array_equal(mixture.run(x[pick], scores[pick], norm), whole[pick])
    same = np.zeros(40, int) + 11  # one row forty times: five groups of every expert
    np.testing.assert_array_equal(mixture.run(x[same], scores[same], norm), whole[same])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 64])
def test_the_operand_of_the_next_product_is_left(cupy, rng, rows):
    """The bytes that its own kernel would have made of the result, inactive rows included."""
    from engine.cuda.driver.compiler import build
    from engine.cuda.driver.launch import launch
    from engine.cuda.matrix.decode_gemm_plan import groups_of_eight, operand_bytes, operand_job

    mixture = Mixture(cupy, rng, (Q4, Q6), size=(12, 3, 256, 1280))
    x, scores = mixture.inputs(rng, rows)
    after = cupy.asarray(rng.standard_normal(1280).astype(np.float32))
    left, expected = (cupy.zeros(operand_bytes(1280), np.uint8) for _ in range(2))
    positions = cupy.asarray(np.where(np.arange(rows) % 5 == 3, -1, 7).astype(np.int32))
    out = cupy.asarray(mixture.run(x, scores, mixture.norm(rng), positions, (after, left)))
    groups = groups_of_eight(rows)
    launch(
        build(operand_job()[0]).get("batch_operand"), (5, groups), 256, (out, 1280, after, 1280, rows, groups, expected)
    )
    np.testing.assert_array_equal(left.get(), expected.get())


@pytest.mark.gpu
def test_inactive_rows_are_left_alone(cupy, rng):
    mixture = Mixture(cupy, rng, (Q4, Q6))
    x, scores = mixture.inputs(rng, 80)
    norm = mixture.norm(rng)
    active = rng.random(80) < 0.6
    positions = cupy.asarray(np.where(active, 5, -1).astype(np.int32))
    expected = np.where(active[:, None], mixture.run(x, scores, norm), x)
    np.testing.assert_array_equal(mixture.run(x, scores, norm, positions), expected)
    np.testing.assert_array_equal(mixture.run(x, scores, norm, cupy.full(80, -1, np.int32)), x)
