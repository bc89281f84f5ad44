"""Attention kernels against float64 numpy over a contiguous history, at edge sizes."""

import numpy as np
import pytest
from gpu_helpers import nmse

from engine.cuda.attention import (
    PAGE,
    AttentionShape,
    DecodePlan,
    LayerAttention,
    RopeStyle,
    build_jobs,
    decode_plan,
    prefill_plan,
    prefill_tiles,
    scratch_bytes,
    shared_limit,
)

ARCHES = (75, 80, 86, 89, 90, 120)


def shape_of(
    heads=8, kv_heads=2, dim=64, *, value_dim=None, rope_dim=None, style=RopeStyle.HALVES, half=True
) -> AttentionShape:
    rope = dim // 2 * 2 if rope_dim is None else rope_dim
    return AttentionShape(heads, kv_heads, dim, value_dim or dim, rope, style, half)


# ---- what needs no GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("half", [True, False])
def test_plans_fit_the_card(arch, dim, half):
    shape = shape_of(32, 8, dim, half=half)
    assert decode_plan(shape, arch, 132).shared_bytes <= shared_limit(arch)
    assert prefill_plan(shape, arch).shared_bytes <= shared_limit(arch)
    assert scratch_bytes(shape, 1, arch, 132) < 4 << 20


@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_compile_without_a_gpu(arch):
    pytest.importorskip("cupy")
    from engine.cuda.module import compile_cubin, kernel_source

    shapes = [shape_of(dim=48)]  # tensor cores, with both tails of a value row
    if arch in (75, 90):
        shapes.append(shape_of(dim=40))  # the plain path
    for shape in shapes:
        for files, defines in build_jobs(shape, arch, 132):
            assert compile_cubin(kernel_source(files, defines), arch, name=files[-1])[:4] == b"\x7fELF"


def test_tiles_cover_every_row_once():
    tiles = prefill_tiles([(0, 1, 3, 99), (1, 130, 0, 7)], 64)
    covered = sorted(row for first, n, _, _ in tiles for row in range(first, first + n))
    assert covered == list(range(131))
    assert [1 + 64, 64, 0, 7 + 64] in tiles.tolist()
    assert prefill_tiles([], 64).shape == (0, 4)


# ---- reference -----------------------------------------------------------------------------------------------


def rope64(x, positions, inv_freq, style, mscale):
    """x (T, heads, dim), rotated in its leading 2 * len(inv_freq) elements; float64 angles as the contract says."""
    angle = (positions.astype(np.float64)[:, None] * inv_freq[None])[:, None, :]
    cos, sin, n = np.cos(angle) * mscale, np.sin(angle) * mscale, len(inv_freq)
    out = x.copy()
    a, b = (slice(0, n), slice(n, 2 * n)) if style is RopeStyle.HALVES else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., a] * sin + x[..., b] * cos
    return out


def rms64(x, weight, eps):
    return x if weight is None else x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def attend64(shape, layer, q, keys, values, position):
    """One row: q (H, Hk), keys (n, K, Hk), values (n, K, Hv) of positions 0..n-1."""
    first = max(0, position - layer.window + 1) if layer.window else 0
    group = shape.heads // shape.kv_heads
    k = np.repeat(keys[first : position + 1], group, axis=1)
    v = np.repeat(values[first : position + 1], group, axis=1)
    scores = np.einsum("hd,phd->hp", q, k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    top = scores.max(1, keepdims=True)
    if layer.sinks is not None:
        top = np.maximum(top, layer.sinks[:, None])
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    if layer.sinks is not None:
        total = total + np.exp(layer.sinks[:, None] - top)
    return np.einsum("hp,phd->hd", weights / total, v).ravel()


class World:
    """Random caches of several sequences on host and device, pages dealt in random order, garbage everywhere else."""

    def __init__(self, shape, lengths, *, seed=0, **options):
        import cupy

        self.cp, self.shape, self.rng = cupy, shape, np.random.default_rng(seed)
        rng, rope = self.rng, shape.rope_dim // 2
        self.lengths = lengths
        self.dtype = np.float16 if shape.cache_half else np.float32
        inv_freq = 10000.0 ** (-np.arange(rope) / max(rope, 1))
        norm = options.pop("qk_norm", False)
        sinks = options.pop("sinks", False)
        self.host = LayerAttention(
            shape.key_dim**-0.5,
            inv_freq,
            q_norm=rng.uniform(0.5, 1.5, shape.key_dim).astype(np.float32) if norm else None,
            k_norm=rng.uniform(0.5, 1.5, shape.key_dim).astype(np.float32) if norm else None,
            sinks=rng.normal(size=shape.heads).astype(np.float32) if sinks else None,
            **options,
        )
        arrays = {name: getattr(self.host, name) for name in ("inv_freq", "q_norm", "k_norm", "sinks")}
        device = {name: None if a is None else cupy.asarray(a) for name, a in arrays.items()}
        self.layer = LayerAttention(self.host.scale, rope_scale=self.host.rope_scale, window=self.host.window,
                                    softcap=self.host.softcap, temperature=self.host.temperature,
                                    temperature_length=self.host.temperature_length, **device)  # fmt: skip
        slots = max(lengths) // PAGE + 1
        order = rng.permutation(len(lengths) * slots + 3).astype(np.int32)
        self.table = order[: len(lengths) * slots].reshape(len(lengths), slots)
        n_pages = len(order)
        self.history = []
        self.pages = {}
        for name, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
            self.pages[name] = np.full((n_pages, shape.kv_heads, PAGE, dim), np.nan, self.dtype)
        for s, length in enumerate(lengths):
            past = []
            for name, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
                data = rng.normal(size=(max(length, 0), shape.kv_heads, dim)).astype(self.dtype)
                for p in range(max(length, 0)):
                    self.pages[name][self.table[s, p // PAGE], :, p % PAGE] = data[p]
                past.append(data.astype(np.float64))
            self.history.append(past)
        self.cache_k, self.cache_v = cupy.asarray(self.pages["k"]), cupy.asarray(self.pages["v"])

    def rows(self, n):
        return self.rng.normal(size=(n, self.shape.row_width)).astype(np.float32)

    def split(self, qkv, positions):
        """Rotated float64 queries, and keys and values as the cache holds them."""
        shape, layer, n = self.shape, self.host, len(qkv)
        x = qkv.astype(np.float64)
        q_end = shape.heads * shape.key_dim
        k_end = q_end + shape.kv_heads * shape.key_dim
        q = rms64(x[:, :q_end].reshape(n, shape.heads, -1), layer.q_norm, layer.norm_eps)
        k = rms64(x[:, q_end:k_end].reshape(n, shape.kv_heads, -1), layer.k_norm, layer.norm_eps)
        q, k = (rope64(a, positions, layer.inv_freq, shape.rope_style, layer.rope_scale) for a in (q, k))
        v = x[:, k_end:].reshape(n, shape.kv_heads, -1)
        q = (
            q
            * (1 + layer.temperature * np.log(1 + np.maximum(positions, 0) // layer.temperature_length))[:, None, None]
        )
        return q, k, v

    def cached(self, name, sequence, position):
        pages = (self.cache_k if name == "k" else self.cache_v).get()
        return pages[self.table[sequence, position // PAGE], :, position % PAGE].astype(np.float64)


def check_decode(shape, lengths, *, plan=None, seed=0, **options):
    """Decodes one token per sequence twice (same bits), compares rows and cache; negative length = padded row."""
    from engine.cuda.attention import Attention

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
    assert not kernels._counters.get().any()
    q, k, v = world.split(qkv, positions)
    worst = 0.0
    after_k, after_v = world.cache_k.get(), world.cache_v.get()
    for s, length in enumerate(lengths):
        if length < 0:
            assert np.isnan(first[s]).all()
            continue
        at = (world.table[s, length // PAGE], slice(None), length % PAGE)
        new_k, new_v = after_k[at].astype(np.float64), after_v[at].astype(np.float64)
        assert nmse(new_k, k[s]) < (1e-6 if shape.cache_half else 1e-12)
        assert np.array_equal(new_v, v[s].astype(np.float32).astype(world.dtype))
        # compare with what the cache holds: the float16 rounding of the new key is not the kernel's error
        keys = np.concatenate([world.history[s][0], new_k[None]])
        values = np.concatenate([world.history[s][1], new_v[None]])
        worst = max(worst, nmse(first[s], attend64(shape, world.host, q[s], keys, values, length)))
        world.pages["k"][at], world.pages["v"][at] = after_k[at], after_v[at]
    assert world.pages["k"].tobytes() == after_k.tobytes(), "a key was written where it should not be"
    assert world.pages["v"].tobytes() == after_v.tobytes(), "a value was written where it should not be"
    assert worst < 1e-10, worst
    return worst


# ---- decode on the GPU ---------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 62, 63, 64, 65, 127, 128, 129, 999, 4096]


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 80, 96, 112, 128, 192, 256, 10, 512])
def test_decode_widths(dim, half):
    check_decode(shape_of(4, 2, dim, half=half), [0, 63, -1, 64, 300, 777])


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1), (16, 1), (12, 1), (14, 2), (3, 1)])
def test_decode_groups(heads, kv_heads, half):
    check_decode(shape_of(heads, kv_heads, 64, half=half), [5, 128, 511, 1500])


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
def test_decode_edge_lengths(half):
    check_decode(shape_of(8, 2, 128, half=half), EDGES)
    check_decode(shape_of(8, 8, 64, half=half), [8192])


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 64},
        {"window": 100},
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
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("style", list(RopeStyle))
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
@pytest.mark.parametrize("layout", [(8, 1), (4, 2), (2, 1), (8, 3)])
def test_decode_layouts_agree(layout, seed):
    from engine.cuda.module import device_arch

    shape = shape_of(8, 2, 64)
    base = decode_plan(shape, device_arch(), 132, warps=layout[0], stages=layout[1])
    for n_splits, few_splits, min_chunk in ((1, 1, 64), (5, 3, 64), (128, 64, 64), (16, 16, 512)):
        plan = DecodePlan(n_splits, few_splits, min_chunk, base.warps, base.stages, base.shared_bytes)
        check_decode(shape, [0, 64, 700, 3000], plan=plan, seed=seed)


@pytest.mark.gpu
def test_decode_far_positions():
    """A window keeps the reference small; the angle of position 131071 must still be right."""
    shape = shape_of(4, 1, 64, half=False)
    check_decode(shape, [131071, 105700], window=128)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
def test_decode_rows_do_not_depend_on_neighbours(half):
    """Neither on the rows beside them nor on how many blocks a batch of that size gets."""
    from engine.cuda.attention import Attention

    shape = shape_of(8, 2, 64, half=half)
    n = 128
    world = World(shape, [700, 3, 1500, 64, 9] + [257] * (n - 5))
    cp, kernels = world.cp, Attention(shape, n)
    qkv, table = cp.asarray(world.rows(n)), cp.asarray(world.table)
    together = cp.empty((n, shape.heads * shape.value_dim), np.float32)
    kernels.decode(world.layer, qkv, world.cache_k, world.cache_v, table,
                   cp.asarray(np.array(world.lengths, np.int32)), together)  # fmt: skip
    for s, length in enumerate(world.lengths[:6]):
        alone = cp.empty((1, shape.heads * shape.value_dim), np.float32)
        kernels.decode(world.layer, qkv[s : s + 1], world.cache_k, world.cache_v, table[s : s + 1],
                       cp.asarray(np.array([length], np.int32)), alone)  # fmt: skip
        assert alone.get().tobytes() == together[s : s + 1].get().tobytes()


@pytest.mark.gpu
def test_decode_graph_replay_follows_the_positions():
    """One captured graph, lengths changed in device memory between replays."""
    from engine.cuda.attention import Attention

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


# ---- prefill on the GPU --------------------------------------------------------------------------------------


def check_prefill(shape, spans, *, seed=0, bias=False, **options):
    """spans: (n_past, n_rows) per sequence; a -1 row is put between them. Limit: float16 weights of the softmax."""
    from engine.cuda.attention import Attention

    world = World(shape, [past for past, _ in spans], seed=seed, **options)
    # the tables must reach past the new rows
    cp, rng = world.cp, world.rng
    slots = max(past + n for past, n in spans) // PAGE + 1
    extra = slots - world.table.shape[1]
    n_pages = len(world.pages["k"])
    if extra > 0:
        new = n_pages + np.arange(len(spans) * extra, dtype=np.int32).reshape(len(spans), extra)
        world.table = np.concatenate([world.table, new], axis=1)
        for name in ("k", "v"):
            more = np.full((new.size, *world.pages[name].shape[1:]), np.nan, world.dtype)
            world.pages[name] = np.concatenate([world.pages[name], more])
        world.cache_k, world.cache_v = cp.asarray(world.pages["k"]), cp.asarray(world.pages["v"])
    positions, sequence, tiles, row = [], [], [], 0
    for s, (past, n) in enumerate(spans):
        tiles.append((row, n, s, past))
        positions += [*range(past, past + n), -1]
        sequence += [s] * (n + 1)
        row += n + 1
    positions, sequence = np.array(positions, np.int32), np.array(sequence, np.int32)
    qkv = world.rows(row)
    shift = rng.normal(size=shape.row_width).astype(np.float32) if bias else None
    kernels = Attention(shape, len(spans))
    device = cp.asarray(qkv)
    table = cp.asarray(world.table)
    kernels.rope_append(
        world.layer, device, world.cache_k, world.cache_v, table, cp.asarray(sequence), cp.asarray(positions),
        bias=None if shift is None else cp.asarray(shift),
    )  # fmt: skip
    out = cp.full((row, shape.heads * shape.value_dim), np.nan, np.float32)
    kernels.prefill(world.layer, device, world.cache_k, world.cache_v, table,
                    cp.asarray(prefill_tiles(tiles, kernels.tile_rows)), out)  # fmt: skip
    got, rotated = out.get(), device.get()
    q, k, v = world.split(qkv if shift is None else qkv + shift, positions)
    after = (world.cache_k.get(), world.cache_v.get())
    worst = 0.0
    for first, n, s, past in tiles:
        keys, values = (
            np.array([pages[world.table[s, p // PAGE], :, p % PAGE] for p in range(past + n)], np.float64)
            for pages in after
        )
        assert nmse(keys[past:], k[first : first + n]) < (1e-6 if shape.cache_half else 1e-12)
        assert nmse(values[past:], v[first : first + n]) < (1e-6 if shape.cache_half else 1e-12)
        flat = q[first : first + n].reshape(n, -1)
        assert nmse(rotated[first : first + n, : flat.shape[1]], flat) < 1e-12
        rows = range(n) if n < 300 else (*range(0, n, 37), n - 1)
        want = np.array([attend64(shape, world.host, q[first + r], keys, values, past + r) for r in rows])
        worst = max(worst, nmse(got[[first + r for r in rows]], want))
    assert np.isnan(got[positions < 0]).all()
    assert np.array_equal(rotated[positions < 0], qkv[positions < 0])
    limit = 2e-7 if shape.tensor_cores else 1e-10
    assert worst < limit, worst
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 112, 128, 192, 256, 512])
def test_prefill_widths(dim, half):
    check_prefill(shape_of(4, 2, dim, half=half), [(0, 70), (33, 1), (100, 17)])


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000])
def test_prefill_lengths(n, half):
    check_prefill(shape_of(4, 1, 64, half=half), [(0, n)])
    check_prefill(shape_of(4, 1, 64, half=half), [(100, n), (64, 3)])


@pytest.mark.gpu
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 50},
        {"window": 64},
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
    check_prefill(shape_of(4, 4, 64, style=RopeStyle.ADJACENT, half=half), [(10, 40)])
    check_prefill(shape_of(8, 1, 64, rope_dim=32, half=half), [(10, 40)])
    check_prefill(shape_of(8, 2, 96, value_dim=64, half=half), [(10, 40)])
