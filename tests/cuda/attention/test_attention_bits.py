"""A row of attention has the same bits however its prompt was cut, on any pages, and beside any other rows."""

from dataclasses import replace

import numpy as np
import pytest

from engine.config import KvType
from engine.cuda.attention.attention import PAGE, prefill_tiles
from tests.support.gpu.attention_reference import World, empty_pages, shape_of

pytestmark = pytest.mark.gpu

SHAPES = [
    shape_of(8, 2, 128),
    shape_of(4, 4, 64),
    shape_of(8, 1, 256),
    shape_of(14, 2, 96),
    shape_of(8, 2, 40),
    shape_of(8, 2, 64, half=False),
    shape_of(8, 2, 128, half=KvType.Q8_0),
    shape_of(8, 1, 256, half=KvType.Q8_0),
    shape_of(14, 2, 96, half=KvType.Q8_0),
    shape_of(8, 2, 128, half=KvType.Q8_0, stretch=2),
    shape_of(8, 2, 64, stretch=4),
]


def name_of(shape):
    longer = f" stretch {shape.stretch}" if shape.stretch > 1 else ""
    return f"{shape.heads}x{shape.key_dim} over {shape.kv_heads} {shape.kv_type}{longer}"


# ---- prompts -------------------------------------------------------------------------------------------------

TOTAL = 1000
CUTS = [
    [1, 999],
    [63, 937],
    [64, 936],
    [65, 935],
    [511, 489],
    [128] * 7 + [104],
    [37] * 27 + [1],
    [17, 300, 683],
]


class Prompt:
    """A prompt of TOTAL random rows, some with large values, and a second sequence of the same cache beside it."""

    def __init__(self, shape, **options):
        self.shape, self.world = shape, World(shape, [0], seed=1, **options)
        rng = self.world.rng
        self.qkv, self.other = self.world.rows(TOTAL), self.world.rows(TOTAL)
        values = shape.kv_heads * shape.value_dim
        self.qkv[:, -values:] *= np.where(rng.random((TOTAL, 1)) < 0.05, 3000, 1)

    def run(self, kernels, cuts, seed, n_beside=0):
        """Feeds the prompt piece by piece on pages in random order; each piece behind n_beside rows of the other."""
        cp, shape, world = self.world.cp, self.shape, self.world
        slots = -(-TOTAL // PAGE)
        pages = np.random.default_rng(seed).permutation(2 * slots + 5)[: 2 * slots].astype(np.int32)
        table = np.full((3, slots + 2), -1, np.int32)
        table[2, :slots], table[0, :slots] = pages[:slots], pages[slots:]
        table = cp.asarray(table)
        caches = [cp.asarray(empty_pages(shape, 2 * slots + 5, dim)) for dim in (shape.key_dim, shape.value_dim)]
        at, found = 0, []
        for piece, n in enumerate(cuts):
            beside = min(n_beside, TOTAL - piece * n_beside)
            past = piece * n_beside
            qkv = cp.asarray(np.concatenate([self.other[past : past + beside], self.qkv[at : at + n]]))
            sequence = cp.asarray(np.repeat(np.array([0, 2], np.int32), (beside, n)))
            positions = cp.asarray(np.r_[past : past + beside, at : at + n].astype(np.int32))
            kernels.rope_append(world.layer, qkv, *caches, table, sequence, positions)
            spans = [(0, beside, 0, past), (beside, n, 2, at)]
            out = cp.full((beside + n, shape.heads * shape.value_dim), np.nan, np.float32)
            tiles = cp.asarray(prefill_tiles(spans, kernels.tile_rows))
            kernels.prefill(world.layer, qkv, *caches, table, tiles, out)
            found.append(out[beside:].get())
            at += n
        return np.concatenate(found)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("window", [0, 200])
def test_prompt_rows_do_not_depend_on_the_cuts(shape, window):
    from engine.cuda.attention.attention import Attention

    prompt, kernels = Prompt(shape, window=window), Attention(shape, 3)
    whole = prompt.run(kernels, [TOTAL], seed=0)
    assert np.isfinite(whole).all()
    for seed, cuts in enumerate(CUTS, 1):
        pieces = prompt.run(kernels, cuts, seed, n_beside=seed % 3 * 21)
        assert pieces.tobytes() == whole.tobytes(), (cuts[:3], np.flatnonzero((pieces != whole).any(1))[:5])


@pytest.mark.parametrize("shape", SHAPES[:3], ids=name_of)
def test_nor_do_those_of_the_general_kernel(shape):
    """The one that other cards use, on any card."""
    from engine.cuda.attention.attention import Attention
    from engine.cuda.attention.attention_plan import prefill_plan
    from engine.cuda.driver.compiler import device_arch

    prompt = Prompt(shape, window=300)
    kernels = Attention(shape, 3, prefill=prefill_plan(shape, device_arch(), hopper=False))
    whole = prompt.run(kernels, [TOTAL], seed=0)
    for seed, cuts in enumerate(CUTS[2:6], 1):
        assert prompt.run(kernels, cuts, seed, n_beside=21).tobytes() == whole.tobytes(), cuts[:3]


# ---- decode --------------------------------------------------------------------------------------------------

LENGTHS = [700, 3, 1500, 64, 9, 0, 257, 256, 5000, 128, 129]


def decode_all(world, kernels, qkv, table, lengths):
    cp = world.cp
    out = cp.full((len(lengths), world.shape.heads * world.shape.value_dim), np.nan, np.float32)
    positions = cp.asarray(np.array(lengths, np.int32))
    kernels.decode(world.layer, qkv, world.cache_k, world.cache_v, table, positions, out)
    assert not kernels._counters.get().any()
    return out.get()


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("window", [0, 600])
def test_decoded_rows_do_not_depend_on_neighbours(shape, window, monkeypatch):
    """Neither on the rows beside them, nor on how many blocks share the work, nor on the scratch memory."""
    from engine.cuda.attention import attention_plan
    from engine.cuda.attention.attention import Attention

    lengths = LENGTHS + [-1, 257, 40] * 20
    world = World(shape, lengths, sinks=True, window=window)
    cp, one = world.cp, Attention(shape, 1)
    qkv, table = cp.asarray(world.rows(len(lengths))), cp.asarray(world.table)
    alone = np.concatenate(
        [decode_all(world, one, qkv[i : i + 1], table[i : i + 1], [n]) for i, n in enumerate(lengths)]
    )
    assert np.isnan(alone).any(1).tolist() == [n < 0 for n in lengths]
    for slots in (attention_plan.MOST_SLOTS, 16):
        monkeypatch.setattr(attention_plan, "MOST_SLOTS", slots)
        for blocks in (one.plan.blocks, 1, 3, 50):
            kernels = Attention(shape, len(lengths), plan=replace(one.plan, blocks=blocks))
            together = decode_all(world, kernels, qkv, table, lengths)
            assert together.tobytes() == alone.tobytes(), (slots, blocks)
    for heads in (1, 3, 4) if shape.tensor_cores else ():
        kernels = Attention(shape, 1, plan=replace(one.plan, part_heads=heads))
        rows = [decode_all(world, kernels, qkv[i : i + 1], table[i : i + 1], [n]) for i, n in enumerate(LENGTHS)]
        assert np.concatenate(rows).tobytes() == alone[: len(LENGTHS)].tobytes(), heads


@pytest.mark.parametrize("half", [True, False])
def test_decoded_rows_do_not_depend_on_pages(half):
    from engine.cuda.attention.attention import Attention

    shape = shape_of(8, 2, 64, half=half)
    world = World(shape, LENGTHS)
    cp, kernels = world.cp, Attention(shape, len(LENGTHS))
    qkv = cp.asarray(world.rows(len(LENGTHS)))
    before = decode_all(world, kernels, qkv, cp.asarray(world.table), LENGTHS)
    order = np.random.default_rng(3).permutation(len(world.pages["k"]))
    world.cache_k, world.cache_v = world.cache_k[cp.asarray(order)], world.cache_v[cp.asarray(order)]
    table = np.argsort(order)[world.table].astype(np.int32)
    assert decode_all(world, kernels, qkv, cp.asarray(table), LENGTHS).tobytes() == before.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_consecutive_rows_of_a_sequence_are_those_of_steps(shape, qk_norm):
    """Several rows of one step are of one sequence: each sees those before it, as if fed one by one."""
    from engine.cuda.attention.attention import Attention

    lengths, counts = [61, 130, 0, 700, 255], [9, 1, 4, 70, 3]
    total, most = sum(counts), max(counts)
    world = World(shape, [n + count for n, count in zip(lengths, counts, strict=True)], qk_norm=qk_norm)
    cp, kernels = world.cp, Attention(shape, total)
    rows = cp.asarray(world.rows(total))
    first = np.cumsum([0, *counts[:-1]])
    alone = np.zeros((total, shape.heads * shape.value_dim), np.float32)
    for step in range(most):
        which = [s for s, count in enumerate(counts) if step < count]
        qkv = rows[cp.asarray([first[s] + step for s in which])]
        out = decode_all(world, kernels, qkv, cp.asarray(world.table[which]), [lengths[s] + step for s in which])
        alone[[first[s] + step for s in which]] = out
    cached = [world.cache_k.get(), world.cache_v.get()]
    for cache in (world.cache_k, world.cache_v):
        cache[...] = cp.asarray(world.pages["k" if cache is world.cache_k else "v"])
    sequence = np.repeat(np.arange(len(counts)), counts)
    positions = np.concatenate([np.arange(n, n + count) for n, count in zip(lengths, counts, strict=True)])
    order = world.rng.permutation(total)  # rows of a step may come in any order
    table, at = cp.asarray(world.table[sequence[order]]), cp.asarray(positions[order].astype(np.int32))
    qkv, out = rows[cp.asarray(order)], cp.full_like(cp.asarray(alone), np.nan)
    before, own = qkv.get(), cp.arange(total, dtype=np.int32)
    kernels.rope_append(world.layer, qkv, world.cache_k, world.cache_v, table, own, at, queries=False)
    kernels.decode(world.layer, qkv, world.cache_k, world.cache_v, table, at, out, early=False)
    assert qkv.get().tobytes() == before.tobytes()
    assert out.get().tobytes() == alone[order].tobytes()
    assert [world.cache_k.get().tobytes(), world.cache_v.get().tobytes()] == [one.tobytes() for one in cached]


# ---- pages that are not there --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [shape_of(8, 2, 64), shape_of(8, 2, 64, half=False)], ids=name_of)
def test_missing_pages_are_neither_read_nor_written(shape):
    """Rows that have all their pages come out as ever; what the others would write is dropped."""
    from engine.cuda.attention.attention import Attention

    lengths = [100, 128, 63, 200, 191]
    world = World(shape, lengths)
    cp, kernels = world.cp, Attention(shape, len(lengths))
    qkv = cp.asarray(world.rows(len(lengths)))
    full = decode_all(world, Attention(shape, len(lengths)), qkv, cp.asarray(world.table), lengths)
    world.cache_k, world.cache_v = cp.asarray(world.pages["k"]), cp.asarray(world.pages["v"])
    table = world.table.copy()
    table[1, 2] = table[2, 0] = table[3, 3] = table[4, 1] = -1  # the new token's page; of the last, an earlier one
    narrow = cp.asarray(table[:, :3])  # and position 200 is beyond the table
    out = decode_all(world, kernels, qkv, narrow, lengths)
    assert out[0].tobytes() == full[0].tobytes()
    assert np.isnan(out[3]).all()
    tokens = cp.asarray(np.array([0, 1, 2, 3, 0], np.int32))
    positions = cp.asarray(np.array([101, 129, 5, 200, -1], np.int32))
    kernels.rope_append(world.layer, qkv, world.cache_k, world.cache_v, narrow, tokens, positions)
    tiles = cp.asarray(prefill_tiles([(1, 1, 1, 129)], kernels.tile_rows))
    kernels.prefill(world.layer, qkv, world.cache_k, world.cache_v, narrow, tiles, cp.asarray(out))
    for name, after in (("k", world.cache_k.get()), ("v", world.cache_v.get())):
        changed = {tuple(place) for place in np.argwhere((after != world.pages[name]) & ~np.isnan(after))[:, [0, 2]]}
        assert changed == {(table[0, 1], 36), (table[0, 1], 37), (table[4, 2], 63)}
