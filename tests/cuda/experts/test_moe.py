"""Expert kernels: builds anywhere; on a GPU routing against numpy, products against float64, bits in any batch."""

import numpy as np
import pytest

from engine.cuda.driver.compiler import device_arch, shared_limit
from engine.cuda.experts.heads import HeadProducts, head_job
from engine.cuda.experts.moe import ExpertProducts, build_jobs, can_gather, down_bytes, gate_up_bytes
from engine.cuda.experts.router import (
    Gating,
    KernelRouting,
    can_score_together,
    route,
    route_job,
    router_job,
    score_experts,
)
from engine.cuda.formats.layouts import LAYOUTS
from engine.cuda.matrix.matvec_plan import UNQUANTIZED
from engine.cuda.rows.activation import KernelActivation
from engine.gguf.quants import dequantize
from engine.gguf.types import GGMLType
from tests.support.gpu.expert_reference import routed, silu
from tests.support.gpu.packed_rows import packed, random_rows

# Two products one after the other, each with the error of a 16-bit input; see test_matvec.py.
TOLERANCE = 1e-7


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 120])
def test_kernels_build_for_every_architecture(arch):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    from engine.cuda.driver import compiler

    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this compiler does not know sm_{arch}")
    routing = KernelRouting(256, 8, Gating.SIGMOID, groups=8, groups_used=4)
    for job in (
        *build_jobs(GGMLType.Q4_K, GGMLType.F16, KernelActivation.SILU, routing, arch, 768, 2048),
        route_job(KernelRouting(3, 1)),
        router_job(GGMLType.F32, arch),
        router_job(GGMLType.BF16, arch),
        head_job(GGMLType.Q8_0, 16, arch),
    ):
        assert compiler.compile_cubin(compiler.kernel_source(*job), arch)


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 120])
@pytest.mark.parametrize("type", [type for type in LAYOUTS if type not in UNQUANTIZED])
def test_blocks_fit_the_shared_memory_of_every_card(type, arch):
    """8 of many experts of 2048 x 4096, beside 10 KiB that a kernel has of its own."""
    layout, room = LAYOUTS[type], shared_limit(arch) - (10 << 10)
    assert gate_up_bytes(type, layout.chunks(4096), arch) <= room
    _, (_, of_down), _ = build_jobs(type, type, KernelActivation.SILU, KernelRouting(128, 8), arch, 2048, 4096)
    assert down_bytes(type, 8, layout.chunks(2048), of_down["WARPS"], of_down["DEPTH"]) <= room


def test_experts_that_do_not_fit_are_told_apart():
    assert can_gather(GGMLType.Q4_K, GGMLType.Q4_K, 768, 2048)
    assert not can_gather(GGMLType.Q4_K, GGMLType.Q6_K, 768, 2048)
    assert not can_gather(GGMLType.Q8_0, GGMLType.Q8_0, 100, 2048)
    assert not can_gather(GGMLType.Q8_0, GGMLType.Q8_0, 96, 72)


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "routing",
    [
        KernelRouting(128, 8),
        KernelRouting(8, 2, normalize=False, weight_scale=2.5),
        KernelRouting(64, 6, Gating.SIGMOID, weight_scale=1.5),
        KernelRouting(256, 8, Gating.SIGMOID, groups=8, groups_used=4, weight_scale=2.5),
        KernelRouting(32, 4, Gating.SOFTMAX_OF_CHOSEN),
        KernelRouting(5, 5),
        KernelRouting(1, 1, Gating.SIGMOID, normalize=False),
        KernelRouting(256, 8, n_shared=1, shared_scored=True, shared_scale=0.5),
        KernelRouting(60, 4, Gating.SIGMOID, weight_scale=2.5, n_shared=28, shared_scale=0.22),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_routing(cupy, rng, routing, biased):
    scores = rng.standard_normal((9, routing.n_scores)).astype(np.float32) * 2
    bias = rng.standard_normal(routing.n_experts).astype(np.float32) * 0.1 if biased else None
    ids, weights = cupy.zeros((9, routing.n_places), np.int32), cupy.zeros((9, routing.n_places), np.float32)
    positions = cupy.asarray(np.array([0, 3, -1, 5, 0, 0, 0, -1, 2], np.int32))
    route(
        routing, cupy.asarray(scores), ids, weights, bias=None if bias is None else cupy.asarray(bias),
        positions=positions,
    )  # fmt: skip
    expected_ids, expected = routed(routing, scores, bias)
    active = positions.get() >= 0
    assert (ids.get()[~active] == -1).all()
    np.testing.assert_array_equal(ids.get()[active], expected_ids[active])
    np.testing.assert_allclose(weights.get()[active], expected[active], rtol=1e-5)


@pytest.mark.gpu
def test_routing_survives_scores_that_are_no_numbers(cupy):
    routing = KernelRouting(8, 2)
    ids, weights = cupy.zeros((1, 2), np.int32), cupy.zeros((1, 2), np.float32)
    route(routing, cupy.full((1, 8), np.nan, np.float32), ids, weights)
    chosen = ids.get()[0]
    assert (chosen >= 0).all()
    assert (chosen < 8).all()
    assert chosen[0] != chosen[1]


SIZES = [
    (KernelRouting(6, 2), 512, 256),
    (KernelRouting(5, 3), 768, 1024),
    (KernelRouting(3, 1), 256, 2048),
    (KernelRouting(3, 2, n_shared=2, shared_scored=True, shared_scale=0.7), 256, 1024),
]


@pytest.fixture(scope="module")
def kernels(cupy):
    """Builds what the test of every type needs side by side."""
    from engine.cuda.driver import compiler
    from engine.cuda.formats import repack

    jobs = [repack.build_job(type) for type in LAYOUTS]
    for routing, *widths in SIZES:
        for type in LAYOUTS:
            jobs += build_jobs(type, type, KernelActivation.SILU, routing, compiler.device_arch(), *widths)
    compiler.prebuild(list({repr(job): job for job in jobs}.values()), compiler.device_arch())


@pytest.mark.gpu
@pytest.mark.parametrize("type", list(LAYOUTS))
@pytest.mark.parametrize(("routing", "width", "columns"), SIZES)
def test_experts_against_float64(cupy, kernels, rng, type, routing, width, columns):
    experts, used = routing.n_stacked, routing.n_places
    raw = [random_rows(rng, type, experts * n, k) for n, k in ((width, columns), (width, columns), (columns, width))]
    gate, up, down = (
        dequantize(r.reshape(-1), type).astype(np.float64).reshape(experts, n, k)
        for r, (n, k) in zip(raw, ((width, columns), (width, columns), (columns, width)), strict=True)
    )
    biases = [rng.standard_normal((experts, n)).astype(np.float32) * 0.1 for n in (width, width, columns)]
    matrices = packed(cupy, type, raw[0], columns, partner=raw[1]), packed(cupy, type, raw[2], width)
    on_device = dict(zip(("gate_bias", "up_bias", "down_bias"), map(cupy.asarray, biases), strict=True))
    rows = 5
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    norm = rng.standard_normal(columns).astype(np.float32)
    scores = rng.standard_normal((rows, routing.n_scores)).astype(np.float32)
    ids, weights = routed(routing, scores)
    positions = cupy.asarray(np.array([4, 0, 1, -1, 9], np.int32))
    n = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6) * norm
    for weigh_input in (False, True):
        products = ExpertProducts(*matrices, routing, KernelActivation.SILU, **on_device, weigh_input=weigh_input)
        out = cupy.asarray(x)
        h = cupy.zeros((rows * used, width), np.float32)
        raw_scores, weight = cupy.asarray(scores), cupy.asarray(norm)
        products.gate_up(out, raw_scores, h, norm=weight, eps=1e-6, positions=positions)
        products.down(raw_scores, h, out, positions=positions)
        found = out.get()
        np.testing.assert_array_equal(found[3], x[3])  # an inactive row
        for row in (0, 1, 2, 4):
            expected = x[row].astype(np.float64)
            for e, w in zip(ids[row], weights[row], strict=True):
                a, b = (w, 1.0) if weigh_input else (1.0, w)
                hidden = silu(gate[e] @ (a * n[row]) + biases[0][e]) * (up[e] @ (a * n[row]) + biases[1][e])
                expected = expected + b * (down[e] @ hidden + biases[2][e])
            error = ((found[row] - expected) ** 2).sum() / ((expected - x[row]) ** 2).sum()
            assert error < TOLERANCE, (row, error)


@pytest.mark.gpu
@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16])
def test_a_row_has_the_same_bits_in_every_batch(cupy, rng, type):
    experts, used, width, columns = 16, 4, 768, 2048
    products = ExpertProducts(
        packed(cupy, type, random_rows(rng, type, experts * width, columns), columns,
               partner=random_rows(rng, type, experts * width, columns)),
        packed(cupy, type, random_rows(rng, type, experts * columns, width), width),
        KernelRouting(experts, used),
        KernelActivation.SILU,
    )  # fmt: skip
    rows = 33
    x = cupy.asarray(rng.standard_normal((rows, columns)).astype(np.float32))
    scores = cupy.asarray(rng.standard_normal((rows, experts)).astype(np.float32))
    norm = cupy.ones(columns, np.float32)

    def run(pick):
        out = cupy.zeros((len(pick), columns), np.float32)
        h = cupy.zeros((len(pick) * used, width), np.float32)
        products.gate_up(x[pick], scores[pick], h, norm=norm, eps=1e-6)
        products.down(scores[pick], h, out)
        return out.get()

    whole = run(np.arange(rows))
    for pick in ([0], [32], [5, 4], [7, 32, 0, 11, 3], list(range(32, 15, -1))):
        np.testing.assert_array_equal(run(np.array(pick)), whole[pick])


ROUTERS = [(128, 2048), (257, 2048), (5, 64), (40, 7168), (17, 9216)]
"""Experts and columns; the last one is too wide for rows together."""


def test_which_routers_multiply_rows_together():
    together = [columns for _, columns in ROUTERS if can_score_together(GGMLType.F32, columns, 80)]
    assert together == [2048, 2048, 64, 7168]
    assert not any(can_score_together(type, 2048, 90) for type in UNQUANTIZED if type is not GGMLType.F32)
    assert not can_score_together(GGMLType.F32, 2048, 75)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("type", "experts", "columns", "together"),
    [
        *((type, *router, False) for type in sorted(UNQUANTIZED) for router in ROUTERS),
        *((GGMLType.F32, *router, True) for router in ROUTERS[:-1]),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_scores_against_float64(cupy, rng, type, experts, columns, whole, together):
    """With norm, bias and factor, and without; a row alone has the same bits. A block has several of many rows."""
    if together and device_arch() < 80:
        pytest.skip("tensor cores with TF32 need compute capability 8.0")
    raw = random_rows(rng, type, experts, columns)
    weights = dequantize(raw.reshape(-1), type).astype(np.float64).reshape(experts, columns)
    bias = rng.standard_normal(experts).astype(np.float32) if whole else None
    norm = rng.standard_normal(columns).astype(np.float32) if whole else None
    router = packed(cupy, type, raw, columns)
    x = rng.standard_normal((300, columns)).astype(np.float32)
    on_device, weight = cupy.asarray(x), None if norm is None else cupy.asarray(norm)
    more = {"bias": None if bias is None else cupy.asarray(bias), "alpha": 0.5 if whole else 1.0, "together": together}
    scores = cupy.full((len(x), experts), np.nan, np.float32)
    score_experts(router, on_device, scores, norm=weight, eps=1e-6, **more)
    n = x.astype(np.float64)
    if whole:
        n = n / np.sqrt((n**2).mean(1, keepdims=True) + 1e-6) * norm
    expected = n @ weights.T
    if whole:
        expected = (expected + bias) * 0.5
    error = ((scores.get() - expected) ** 2).sum() / (expected**2).sum()
    assert error < TOLERANCE, error
    for first, n_rows in ((1, 1), (298, 1), (7, 9), (100, 150)):
        some = cupy.empty((n_rows, experts), np.float32)
        score_experts(router, on_device[first : first + n_rows], some, norm=weight, eps=1e-6, **more)
        np.testing.assert_array_equal(some.get(), scores.get()[first : first + n_rows])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_launches_one_behind_the_other_give_the_same_bits(cupy, rng, rows):
    """Each starts before its predecessor has ended, and may read only what is older."""
    experts, used, width, columns, type = 64, 8, 768, 2048, GGMLType.Q4_K
    layers = [
        (
            packed(cupy, GGMLType.F32, random_rows(rng, GGMLType.F32, experts, columns), columns),
            ExpertProducts(
                packed(cupy, type, random_rows(rng, type, experts * width, columns), columns,
                       partner=random_rows(rng, type, experts * width, columns)),
                packed(cupy, type, random_rows(rng, type, experts * columns, width), width),
                KernelRouting(experts, used),
                KernelActivation.SILU,
            ),
        )
        for _ in range(3)
    ]  # fmt: skip
    norm = cupy.ones(columns, np.float32)
    start = cupy.asarray(rng.standard_normal((rows, columns)).astype(np.float32))
    scores, h = cupy.zeros((rows, experts), np.float32), cupy.zeros((rows * used, width), np.float32)

    def run(wait):
        x = start.copy()
        for router, products in layers * 8:
            score_experts(router, x, scores, norm=norm, eps=1e-6)
            wait()
            products.gate_up(x, scores, h, norm=norm, eps=1e-6)
            wait()
            products.down(scores, h, x)
            wait()
        return x.get()

    expected = run(cupy.cuda.get_current_stream().synchronize)
    assert np.isfinite(expected).all()
    for _ in range(5):
        np.testing.assert_array_equal(run(lambda: None), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("type", list(LAYOUTS))
@pytest.mark.parametrize(("rows", "heads", "outputs", "columns"), [(3, 5, 48, 256), (1, 16, 512, 512)])
def test_every_head_has_a_matrix_of_its_own(cupy, rng, type, rows, heads, outputs, columns):
    raw = random_rows(rng, type, heads * outputs, columns)
    weights = dequantize(raw.reshape(-1), type).astype(np.float64).reshape(heads, outputs, columns)
    x = rng.standard_normal((rows * heads, columns)).astype(np.float32)
    out = cupy.empty((rows * heads, outputs), np.float32)
    HeadProducts(packed(cupy, type, raw, columns), heads, 4)(cupy.asarray(x), out)
    expected = np.einsum("hnk,rhk->rhn", weights, x.reshape(rows, heads, columns)).reshape(out.shape)
    error = ((out.get() - expected) ** 2).sum() / (expected**2).sum()
    assert error < TOLERANCE, error
