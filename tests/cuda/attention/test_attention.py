"""Attention kernels against float64 numpy over a contiguous history, at edge sizes."""

from dataclasses import replace

import numpy as np
import pytest

from engine.config import KvType
from engine.cuda.attention.attention import (
    PAGE,
    KernelRopeStyle,
    build_jobs,
    decode_plan,
    prefill_plan,
    prefill_tiles,
    scratch_bytes,
    shared_limit,
)
from tests.support.gpu.attention_reference import (
    CACHED_BOUND,
    World,
    attend64,
    empty_pages,
    numbers,
    rounded,
    shape_of,
)
from tests.support.gpu.helpers import nmse

ARCHES = (75, 80, 86, 89, 90, 120)
KINDS = [True, False, KvType.Q8_0]
"""Cache types, as shape_of() takes them."""


# ---- what needs no GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("half", [True, False])
def test_plans_fit_the_card(arch, dim, half):
    shape = shape_of(32, 8, dim, half=half)
    assert decode_plan(shape, arch, 132).shared_bytes <= shared_limit(arch)
    for hopper in (True, False):
        assert prefill_plan(shape, arch, hopper=hopper).shared_bytes <= shared_limit(arch)
    assert scratch_bytes(shape, 1, arch, 132) < 4 << 20
    assert scratch_bytes(shape, 256, arch, 132) < 72 << 20


@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_compile_without_a_gpu(arch):
    pytest.importorskip("cupy")
    from engine.cuda.driver.compiler import compile_cubin, kernel_source

    shapes = [shape_of(dim=48)]  # tensor cores, with both tails of a value row
    if arch in (75, 90):
        shapes.append(shape_of(dim=40))  # the plain path
        shapes.append(shape_of(dim=64, both_ways=True))
        shapes.append(shape_of(dim=40, half=False, both_ways=True, distances=128))
    for shape in shapes:
        for files, defines in build_jobs(shape, arch, 132):
            assert compile_cubin(kernel_source(files, defines), arch, name=files[-1])[:4] == b"\x7fELF"


def test_tiles_cover_every_row_once():
    tiles = prefill_tiles([(0, 1, 3, 99), (1, 130, 0, 7)], 64)
    covered = sorted(row for first, n, _, _ in tiles for row in range(first, first + n))
    assert covered == list(range(131))
    assert [1 + 64, 64, 0, 7 + 64] in tiles.tolist()
    assert prefill_tiles([], 64).shape == (0, 4)


def check_decode(shape, lengths, *, plan=None, seed=0, **options):
    """Decodes one token per sequence twice (same bits), compares rows and cache; negative length = padded row."""
    from engine.cuda.attention.attention import Attention

    world = World(shape, lengths, seed=seed, **options)
    cp, n = world.cp, len(lengths)
    kernels = Attention(shape, n, plan=plan)
    positions = np.array(lengths, np.int32)
    qkv = world.rows(n)
    out = cp.full((n, shape.heads * shape.value_dim), np.nan, np.float32)
    args = (world.layer, cp.asarray(qkv), world.cache_k, world.cache_v, cp.asarray(world.table), cp.asarray(positions))
    kernels.decode(*args, out)
    first = out.get()
    kernels.decode(*args, out)
    assert first.tobytes() == out.get().tobytes()
    runs = Attention(shape, n, plan=replace(kernels.plan, few_rows=0))  # blocks that serve several ranges
    runs.decode(*args, out)
    assert first.tobytes() == out.get().tobytes()
    assert not kernels._counters.get().any()
    assert not runs._counters.get().any()
    q, k, v = world.split(qkv, positions)
    worst = 0.0
    after_k, after_v = world.on_device("k"), world.on_device("v")
    widths = (shape.key_dim, shape.key_dim if shape.values_in_keys else shape.value_dim)
    before_k, before_v = (numbers(shape, world.pages[name], dim) for name, dim in zip("kv", widths, strict=True))
    for s, length in enumerate(lengths):
        if length < 0:
            assert np.isnan(first[s]).all()
            continue
        at = (world.table[s, length // PAGE], slice(None), length % PAGE)
        new_k, new_v = after_k[at].astype(np.float64), after_v[at][..., : shape.value_dim].astype(np.float64)
        assert nmse(new_k, k[s]) < CACHED_BOUND[shape.kv_type]
        assert np.array_equal(new_v, rounded(shape, v[s]))
        # compare with what the cache holds: the float16 rounding of the new key is not the kernel's error
        keys = np.concatenate([world.history[s][0], new_k[None]])
        values = np.concatenate([world.history[s][1], new_v[None]])
        worst = max(worst, nmse(first[s], attend64(shape, world.host, q[s], keys, values, length)))
        before_k[at], before_v[at] = after_k[at], after_v[at]
    assert before_k.tobytes() == after_k.tobytes(), "a key was written where it should not be"
    assert before_v.tobytes() == after_v.tobytes(), "a value was written where it should not be"
    assert worst < (1e-7 if shape.bytes_cached and shape.tensor_cores else 1e-10), worst
    return worst


# ---- decode on the GPU ---------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 62, 63, 64, 65, 127, 128, 129, 999, 4096]


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 80, 96, 112, 128, 192, 256, 10, 512])
def test_decode_widths(dim, half):
    check_decode(shape_of(4, 2, dim, half=half), [0, 63, -1, 64, 300, 777])


@pytest.mark.gpu
@pytest.mark.parametrize("half", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1), (16, 1), (12, 1), (14, 2), (3, 1)])
def test_decode_groups(heads, kv_heads, half):
    check_decode(shape_of(heads, kv_heads, 64, half=half), [5, 128, 511, 1500])


@pytest.mark.gpu
@pytest.mark.parametrize("half", KINDS)
def test_decode_edge_lengths(half):
    check_decode(shape_of(8, 2, 128, half=half), EDGES)
    check_decode(shape_of(8, 8, 64, half=half), [8192])


@pytest.mark.gpu
@pytest.mark.parametrize("half", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 64},
        {"window": 100},
        {"window": -100},
        {"softcap": 5.0},
        {"temperature": 0.3, "temperature_length": 40},
        {"qk_norm": True},
        {"rope_scale": 1.25},
        {"sinks": True},
        {"window": 700, "softcap": 20.0, "qk_norm": True, "sinks": True},
    ],
    ids=str,
)
def test_decode_options(options, half):
    check_decode(shape_of(8, 2, 64, half=half), [0, 1, 99, 100, 640, 2000], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("half", KINDS)
@pytest.mark.parametrize("style", list(KernelRopeStyle))
@pytest.mark.parametrize("rope_dim", [0, 32, 64])
def test_decode_rope(style, rope_dim, half):
    check_decode(shape_of(8, 2, 64, rope_dim=rope_dim, style=style, half=half), [0, 7, 130])


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
def test_decode_value_width_differs(half):
    check_decode(shape_of(8, 2, 96, value_dim=64, half=half), [3, 200])
    check_decode(shape_of(8, 2, 64, value_dim=112, half=half), [3, 200])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warps", [8, 4, 2])
def test_decode_layouts_agree(warps, seed):
    from engine.cuda.driver.compiler import device_arch

    shape = shape_of(8, 2, 64)
    base = decode_plan(shape, device_arch(), 132, warps=warps)
    for n_splits, few_splits, min_chunk in ((1, 1, 64), (5, 3, 64), (128, 64, 64), (16, 16, 512)):
        plan = replace(base, n_splits=n_splits, few_splits=few_splits, min_chunk=min_chunk)
        check_decode(shape, [0, 64, 700, 3000], plan=plan, seed=seed)


@pytest.mark.gpu
def test_decode_far_positions():
    """A window keeps the reference small; the angle of position 131071 must still be right."""
    shape = shape_of(4, 1, 64, half=False)
    check_decode(shape, [131071, 105700], window=128)


@pytest.mark.gpu
def test_decode_graph_replay_follows_the_positions():
    """One captured graph, lengths changed in device memory between replays."""
    from engine.cuda.attention.attention import Attention

    shape = shape_of(8, 2, 64)
    world = World(shape, [1200])
    cp, kernels = world.cp, Attention(shape, 1)
    qkv, table = cp.asarray(world.rows(1)), cp.asarray(world.table)
    position = cp.zeros(1, np.int32)
    eager, out = (cp.empty((1, shape.heads * shape.value_dim), np.float32) for _ in range(2))
    stream = cp.cuda.Stream(non_blocking=True)
    args = (world.layer, qkv, world.cache_k, world.cache_v, table, position)
    kernels.decode(*args, out, stream=stream)
    with stream:
        stream.begin_capture()
        for _ in range(3):
            kernels.decode(*args, out, stream=stream)
        graph = stream.end_capture()
    for p in (1200, 0, 500, 64):
        position.fill(p)
        kernels.decode(*args, eager)
        out.fill(np.nan)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert eager.get().tobytes() == out.get().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 192, 256, 512])
def test_widths_of_a_cache_of_bytes(dim):
    shape = shape_of(4, 2, dim, half=KvType.Q8_0)
    check_decode(shape, [0, 63, -1, 64, 300, 777])
    check_decode(shape_of(4, 2, dim, value_dim=96, half=KvType.Q8_0), [3, 700])
    check_decode(shape_of(4, 2, dim, half=KvType.Q8_0, stretch=2), [63, 3000])
    check_decode(shape_of(4, 2, dim, stretch=4), [63, 3000])
    check_prefill(shape, [(0, 70), (33, 1), (100, 17)])


# ---- prefill on the GPU --------------------------------------------------------------------------------------


def check_prefill(shape, spans, *, seed=0, bias=False, plan=None, **options):
    """spans: (n_past, n_rows) per sequence; a -1 row is put between them.

    Limit: float16 weights, on Hopper float16 queries, and of a cache of bytes keys and values as float16.
    """
    from engine.cuda.attention.attention import Attention

    world = World(shape, [past for past, _ in spans], seed=seed, **options)
    # the tables must reach past the new rows
    cp, rng = world.cp, world.rng
    slots = max(past + n for past, n in spans) // PAGE + 1
    extra = slots - world.table.shape[1]
    n_pages = len(world.pages["k"])
    if extra > 0:
        new = n_pages + np.arange(len(spans) * extra, dtype=np.int32).reshape(len(spans), extra)
        world.table = np.concatenate([world.table, new], axis=1)
        for name, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
            more = empty_pages(shape, new.size, shape.key_dim if shape.values_in_keys else dim)
            world.pages[name] = np.concatenate([world.pages[name], more])
        world.cache_k = cp.asarray(world.pages["k"])
        world.cache_v = world.cache_k if shape.values_in_keys else cp.asarray(world.pages["v"])
    positions, sequence, tiles, row = [], [], [], 0
    for s, (past, n) in enumerate(spans):
        tiles.append((row, n, s, past))
        positions += [*range(past, past + n), -1]
        sequence += [s] * (n + 1)
        row += n + 1
    positions, sequence = np.array(positions, np.int32), np.array(sequence, np.int32)
    qkv = world.rows(row)
    shift = rng.normal(size=shape.row_width).astype(np.float32) if bias else None
    kernels = Attention(shape, len(spans), prefill=plan)
    device = cp.asarray(qkv)
    table = cp.asarray(world.table)
    kernels.rope_append(
        world.layer, device, world.cache_k, world.cache_v, table, cp.asarray(sequence), cp.asarray(positions),
        bias=None if shift is None else cp.asarray(shift),
    )  # fmt: skip
    out = cp.full((row, shape.heads * shape.value_dim), np.nan, np.float32)
    cut, whole = prefill_tiles(tiles, kernels.tile_rows), np.array([n for _, n in spans], np.int32)
    kernels.prefill(
        world.layer, device, world.cache_k, world.cache_v, table, cp.asarray(cut), out,
        lengths=cp.asarray(whole) if shape.both_ways else None,
    )  # fmt: skip
    got, rotated = out.get(), device.get()
    q, k, v = world.split(qkv if shift is None else qkv + shift, positions)
    after = (world.on_device("k"), world.on_device("v"))
    worst = 0.0
    for first, n, s, past in tiles:
        keys, values = (
            np.array([pages[world.table[s, p // PAGE], :, p % PAGE, :dim] for p in range(past + n)], np.float64)
            for pages, dim in zip(after, (shape.key_dim, shape.value_dim), strict=True)
        )
        assert nmse(keys[past:], k[first : first + n]) < CACHED_BOUND[shape.kv_type]
        assert nmse(values[past:], v[first : first + n]) < CACHED_BOUND[shape.kv_type]
        flat = q[first : first + n].reshape(n, -1)
        assert nmse(rotated[first : first + n, : flat.shape[1]], flat) < 1e-12
        rows = range(n) if n < 300 else (*range(0, n, 37), n - 1)
        want = np.array([attend64(shape, world.host, q[first + r], keys, values, past + r) for r in rows])
        worst = max(worst, nmse(got[[first + r for r in rows]], want))
    assert np.isnan(got[positions < 0]).all()
    assert np.array_equal(rotated[positions < 0], qkv[positions < 0])
    limit = (4e-7 if shape.bytes_cached else 2e-7) if shape.tensor_cores else 1e-10
    assert worst < limit, worst
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 112, 128, 192, 256, 512])
def test_prefill_widths(dim, half):
    check_prefill(shape_of(4, 2, dim, half=half), [(0, 70), (33, 1), (100, 17)])


@pytest.mark.gpu
@pytest.mark.parametrize("half", KINDS)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000])
def test_prefill_lengths(n, half):
    check_prefill(shape_of(4, 1, 64, half=half), [(0, n)])
    check_prefill(shape_of(4, 1, 64, half=half), [(100, n), (64, 3)])


@pytest.mark.gpu
@pytest.mark.parametrize("half", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 50},
        {"window": 64},
        {"window": -50},
        {"softcap": 5.0},
        {"temperature": 0.3, "temperature_length": 40},
        {"qk_norm": True, "bias": True},
        {"rope_scale": 1.25},
        {"sinks": True},
        {"window": 90, "softcap": 20.0, "qk_norm": True, "sinks": True},
    ],
    ids=str,
)
def test_prefill_options(options, half):
    check_prefill(shape_of(8, 2, 64, half=half), [(0, 150), (200, 20)], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
def test_prefill_groups_and_rope(half):
    check_prefill(shape_of(4, 4, 64, style=KernelRopeStyle.ADJACENT, half=half), [(10, 40)])
    check_prefill(shape_of(8, 1, 64, rope_dim=32, half=half), [(10, 40)])
    check_prefill(shape_of(8, 2, 96, value_dim=64, half=half), [(10, 40)])
    check_prefill(shape_of(14, 2, 64, half=half), [(10, 40)])
    check_prefill(shape_of(3, 1, 192, value_dim=128, half=half), [(10, 400)])


TEXTS = [(0, 70), (0, 1), (0, 300), (0, 64), (0, 129)]


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 40}, {"window": 131, "softcap": 5.0}], ids=str)
def test_texts_of_which_all_is_seen(options, half):
    for heads, kv_heads, dim in ((4, 4, 64), (8, 2, 128), (3, 1, 256)):
        check_prefill(shape_of(heads, kv_heads, dim, half=half, both_ways=True), TEXTS, **options)
    shape = shape_of(12, 12, 64, half=half, both_ways=True)
    check_prefill(shape, TEXTS, plan=prefill_plan(shape, 90, hopper=False), **options)
    check_prefill(shape_of(4, 2, 64, half=half, rope_dim=0, alibi=True, both_ways=True), TEXTS, **options)
    check_prefill(shape_of(4, 2, 64, half=half, rope_dim=0, distances=20, both_ways=True), TEXTS, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [48, 64, 128, 256])
def test_prefill_general_kernel(dim):
    """The one that other cards use, on any card."""
    from engine.cuda.driver.compiler import device_arch

    for half in (True, KvType.Q8_0) if dim % 32 == 0 else (True,):
        shape = shape_of(8, 2, dim, half=half)
        plan = prefill_plan(shape, device_arch(), hopper=False)
        check_prefill(shape, [(0, 150), (200, 20)], plan=plan, window=90, sinks=True)
        check_prefill(shape, [(33, 1), (100, 17)], plan=plan)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
def test_linear_biases(half):
    for heads, kv_heads, options in ((8, 8, {}), (6, 2, {"window": 100, "sinks": True}), (3, 1, {"softcap": 4.0})):
        shape = shape_of(heads, kv_heads, 64, half=half, rope_dim=0, alibi=True)
        check_decode(shape, [0, 63, -1, 64, 300, 2000], **options)
        check_prefill(shape, [(0, 70), (33, 1), (100, 117)], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("heads", "dims"), [(16, (576, 512)), (1, (576, 512)), (5, (40, 32))])
def test_values_in_keys(heads, dims, half):
    shape = shape_of(heads, 1, dims[0], value_dim=dims[1], half=half, rope_dim=0, values_in_keys=True)
    check_decode(shape, [0, 63, -1, 64, 300, 2000])
    check_prefill(shape, [(0, 70), (33, 1), (100, 117)])
