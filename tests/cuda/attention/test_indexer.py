"""Kernels of indexers against numpy: keys, scores, choices and attention over them, in every form of a step.

The same tests run the kernels compiled for the CPU (small shapes, thread by thread) and on a GPU.
"""

import math

import numpy as np
import pytest

from engine.config import PAGE, KvType
from engine.cpu.bricks.indexer import best
from engine.cuda.attention.attention_shape import AttentionShape, KernelRopeStyle, LayerAttention
from engine.cuda.indexer import indexer
from engine.cuda.indexer.indexer import Choice, ChosenAttention, PoolArrays, Rows, Scored
from engine.cuda.indexer.plan import (
    FEW_ROWS,
    IndexerShape,
    Pool,
    Ranges,
    choice_arrays,
    head_tile,
    range_arrays,
    ranges_of,
    scored_rows,
)
from engine.cuda.launch_plan.scratch import indexer_bytes, indexer_bytes_per_page
from tests.support.gpu.fake_runner import pretended
from tests.support.gpu.host_kernels import HostKernels, Memory
from tests.support.models import indexer_models

CONTEXT = 4 * PAGE


def tokens(heads, width, top, half=True):
    """An indexer of single positions for all heads."""
    return IndexerShape(heads, width, top, 1, 0, False, top, KvType.F16 if half else KvType.F32)


def blocks(heads, width, top, block, local, half=True):
    """An indexer whose heads choose blocks."""
    kv_type = KvType.F16 if half else KvType.F32
    return IndexerShape(heads, width, top, block, local, True, top * block, kv_type)


def pools(heads, width, top, block, pool, half=True):
    """An indexer of full blocks, whose keys are pooled."""
    kv_type, reads_all = KvType.F16 if half else KvType.F32, top * block + block - 1
    rope = (4, 6, True) if pool is Pool.MEAN else (0, 0, False)
    return IndexerShape(heads, width, top, block, 0, False, reads_all, kv_type, pool, *rope)


def heads(n, kv_heads, key_dim, value_dim=None, half=True, **options):
    """Heads of attention."""
    kv_type = KvType.F16 if half else KvType.F32
    return AttentionShape(n, kv_heads, key_dim, value_dim or key_dim, 0, KernelRopeStyle.ADJACENT, kv_type, **options)


LATENT = heads(19, 1, 48, 32, values_in_keys=True)
HOST = {
    "tokens": (tokens(16, 16, 40), LATENT, False),
    "tokens plain": (tokens(16, 16, 40), LATENT, True),
    "few odd heads": (tokens(4, 16, 40), heads(3, 1, 24, 16, values_in_keys=True), False),
    "tokens f32": (tokens(17, 6, 7, half=False), heads(4, 2, 10, 6, half=False), False),
    "blocks": (blocks(2, 8, 6, 8, 1), heads(4, 2, 16), False),
    "blocks, odd heads": (blocks(2, 8, 6, 8, 1), heads(4, 2, 20), False),
    "means": (pools(3, 12, 5, 4, Pool.MEAN), heads(4, 2, 16), False),
    "gates": (pools(35, 12, 7, 5, Pool.GATES, half=False), heads(4, 2, 10, half=False), False),
    "blocks f32": (blocks(2, 12, 3, 5, 0, half=False), heads(4, 2, 12, half=False), False),
}
DEEPSEEK = tokens(64, 128, 96), heads(128, 1, 576, 512, values_in_keys=True)
GPU = HOST | {
    "deepseek 3.2": (*DEEPSEEK, False),
    "deepseek 3.2 plain": (*DEEPSEEK, True),
    "glm 5": (tokens(32, 128, 130, half=False), heads(64, 1, 576, 512, half=False, values_in_keys=True), False),
    "minimax m3": (blocks(4, 128, 3, 48, 1), heads(64, 4, 128), False),
    "qwen 4": (pools(64, 128, 24, 4, Pool.MEAN), heads(16, 2, 128), False),
    "glm 5.3": (pools(32, 128, 24, 4, Pool.GATES), heads(64, 1, 576, 512, values_in_keys=True), False),
    "wide heads": (blocks(2, 64, 3, 48, 1), heads(8, 2, 256), False),
}
"""Indexer, heads, and whether attention is in float32 where tensor cores could multiply."""
CASES = [pytest.param("host", name, id=f"host-{name}") for name in HOST]
CASES += [pytest.param("gpu", name, id=f"gpu-{name}", marks=[pytest.mark.gpu, pytest.mark.shared]) for name in GPU]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels of all host shapes, compiled for the CPU."""
    jobs = []
    for shape, attention, plain in HOST.values():
        tile = head_tile(attention, plain=plain)
        assert tile.tensor_cores == (attention in (LATENT, HOST["blocks"][1]) and not plain)
        jobs += [shape.append_job(), shape.scores_job(plain=plain), shape.choose_job()]
        jobs += [shape.attention_job(attention, tile), shape.merge_job(attention, tile)]
    return HostKernels(tmp_path_factory.mktemp("host"), jobs)


class World:
    """Sequences with random caches, and rows of a step at some of their positions."""

    def __init__(self, kind, case, positions, sequence, *, at_once=None, whole_numbers=False, seed=0):
        shape, attention, plain = case
        self.memory, self.shape, self.attention = Memory(kind), shape, attention
        self.scale, self.tile = attention.key_dim**-0.5, head_tile(attention, plain=plain)
        self.positions, self.sequence = np.array(positions, np.int32), np.array(sequence, np.int32)
        n, self.rng = len(positions), np.random.default_rng(seed)
        sequences, pages = max(sequence) + 1, CONTEXT // PAGE
        order = self.rng.permutation(sequences * pages + 1)[: sequences * pages]
        self.table = order.reshape(sequences, pages).astype(np.int32)
        dtype = np.float16 if shape.kv_type is KvType.F16 else np.float32

        def normal(*size):
            made = self.rng.integers(-2, 3, size) if whole_numbers else self.rng.normal(size=size)
            return made.astype(np.float32)

        self.index = np.full((sequences * pages + 1, PAGE, shape.cached_width), np.nan, dtype)
        self.keys = np.full((sequences * pages + 1, attention.kv_heads, PAGE, attention.key_dim), np.nan, dtype)
        self.values = np.full((*self.keys.shape[:3], attention.value_dim), np.nan, dtype)
        for sequence in range(sequences):
            for page in self.table[sequence]:
                self.index[page] = normal(*self.index.shape[1:])
                self.keys[page], self.values[page] = normal(*self.keys.shape[1:]), normal(*self.values.shape[1:])
        if attention.values_in_keys:
            self.values = self.keys[..., : attention.value_dim]
        self.new, self.q = normal(n, shape.cached_width + 3), normal(n, shape.heads * shape.width)
        self.weights = None if shape.by_head or shape.pool is Pool.MEAN else normal(n, shape.heads)
        self.ape = normal(shape.block, shape.width) if shape.pool is Pool.GATES else None
        self.pool_weight = normal(shape.width) if shape.pool is Pool.MEAN else None
        self.inv_freq = 0.3 ** np.arange(shape.rope_dim // 2)
        self.qkv, self.sinks = normal(n, attention.row_width), normal(attention.heads)
        arrays = choice_arrays(shape, n, 1, CONTEXT)
        kinds = {"chosen": np.int32, "whole": np.int32, "choosing": np.int32, "identity": np.int32}
        memory = {name: np.full(size, -9, kinds.get(name, np.float32)) for name, size in arrays.items()}
        self.choice = Choice(
            shape, {k: self.memory.up(v) for k, v in memory.items()}, at_once or scored_rows(n), plain=plain
        )

    def run(self, ranges=None, dealt=None):
        """Appends, chooses and attends; gives the results of all rows."""
        up, choice, n = self.memory.up, self.choice, len(self.positions)
        rows = Rows(up(self.positions), up(self.table), up(self.sequence))
        cache = up(self.index)
        choice.append(up(self.new)[:, : self.shape.cached_width], cache, rows)
        weights, ape, norm = (None if one is None else up(one) for one in (self.weights, self.ape, self.pool_weight))
        pool = None
        if self.shape.pool is not Pool.NONE:
            pool = PoolArrays(ape, norm, 1e-5, up(self.inv_freq), 1.5)
        choice.choose(Scored(up(self.q), weights, pool), cache, rows)
        self.index = self.memory.down(cache)
        ranges = ranges or ranges_of(self.shape, self.attention, self.tile, CONTEXT, 8)
        memory = {
            name: np.full(size, np.nan, np.float32) for name, size in range_arrays(self.attention, ranges).items()
        }
        attend = ChosenAttention(choice, self.attention, self.tile, ranges, {k: up(v) for k, v in memory.items()})
        out = up(np.full((n, self.attention.heads * self.attention.value_dim), -7, np.float32))
        keys = up(self.keys)
        layer = LayerAttention(scale=self.scale, sinks=up(self.sinks))
        attend(layer, up(self.qkv), keys, keys if self.attention.values_in_keys else up(self.values), rows, out)
        return self.memory.down(out)

    def seen(self, array, row):
        """What a row's sequence has cached up to its position, position by position."""
        pages = array[self.table[self.sequence[row]]]
        flat = pages.reshape(-1, *pages.shape[2:]) if array is self.index else pages.transpose(0, 2, 1, 3)
        flat = flat if array is self.index else flat.reshape(-1, *flat.shape[2:])
        return flat[: self.positions[row] + 1].astype(np.float64)

    def pooled(self, cached):
        """Keys of the full blocks of what is cached, (blocks, Di)."""
        shape = self.shape
        n = len(cached) // shape.block
        keys = cached[: n * shape.block, : shape.width].reshape(n, shape.block, -1)
        if shape.pool is Pool.GATES:
            gates = np.exp(cached[: n * shape.block, shape.width :].reshape(keys.shape) + self.ape)
            return (keys * gates).sum(1) / gates.sum(1)
        mean, half = keys.mean(1), shape.rope_dim // 2
        mean = mean / np.sqrt((mean * mean).mean(1, keepdims=True) + 1e-5) * self.pool_weight
        angle = np.outer(np.arange(n) * shape.block, self.inv_freq)
        cos, sin = 1.5 * np.cos(angle), 1.5 * np.sin(angle)
        first, second = (mean[:, at : at + half].copy() for at in (shape.rope_first, shape.rope_first + half))
        mean[:, shape.rope_first :][:, :half] = first * cos - second * sin
        mean[:, shape.rope_first + half :][:, :half] = first * sin + second * cos
        return mean

    def chosen(self, row):
        """Positions of every choice of a row, from the definition."""
        shape, n = self.shape, self.positions[row] + 1
        if shape.pool is not Pool.NONE:
            dots = self.q[row].reshape(shape.heads, -1).astype(np.float64) @ self.pooled(self.seen(self.index, row)).T
            weights = np.ones(shape.heads) if self.weights is None else self.weights[row] * shape.weight_factor
            taken = best((weights @ np.maximum(dots, 0.0)).astype(np.float32), shape.top)
            positions = np.append(taken, n // shape.block)[:, None] * shape.block + np.arange(shape.block)
            return [positions[positions < n]]
        dots = self.q[row].reshape(shape.heads, -1).astype(np.float64) @ self.seen(self.index, row).T
        if not shape.by_head:
            return [best((self.weights[row] @ np.maximum(dots, 0.0)).astype(np.float32), shape.top)]
        found = []
        for scores in dots:
            highest = np.array([scores[i : i + shape.block].max() for i in range(0, n, shape.block)], np.float32)
            highest[max(0, len(highest) - shape.local) :] = np.inf
            positions = best(highest, shape.top)[:, None] * shape.block + np.arange(shape.block)
            found.append(positions[positions < n])
        return found

    def attended(self, row):
        """The result of a row in float64."""
        attention, chosen = self.attention, self.chosen(row)
        group, out = attention.heads // attention.kv_heads, []
        keys, values = self.seen(self.keys, row), self.seen(self.values, row)
        for head in range(attention.heads):
            at = chosen[0 if len(chosen) == 1 else head // group]
            query = self.qkv[row, head * attention.key_dim :][: attention.key_dim].astype(np.float64)
            scores = np.append(keys[at, head // group] @ query * self.scale, self.sinks[head])
            weights = np.exp(scores - scores.max())
            out.append(weights[:-1] / weights.sum() @ values[at, head // group])
        return np.concatenate(out)


@pytest.fixture
def world(request, monkeypatch):
    """Makes worlds on "host" or "gpu"."""

    def make(kind, name, positions, sequence, **options):
        if kind == "host":
            request.getfixturevalue("host").install(monkeypatch, indexer)
        return World(kind, GPU[name], positions, sequence, **options)

    return make


def some_positions(shape):
    """Rows of several sequences: none, all chosen, one more than that, in the middle, at the end."""
    return [-1, shape.all_chosen - 1, shape.all_chosen, 170, 0, CONTEXT - 1, CONTEXT, 150], [0, 1, 2, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_rows_attend_to_the_best_positions(world, kind, name):
    made = world(kind, name, *some_positions(GPU[name][0]))
    out, shape = made.run(), made.shape
    down = made.memory.down
    whole = [0 <= position < shape.all_chosen for position in made.positions]
    choosing = [shape.all_chosen <= position < CONTEXT for position in made.positions]
    assert down(made.choice.whole)[:8].tolist() == np.where(whole, made.positions, -1).tolist()
    assert down(made.choice.choosing)[:8].tolist() == np.where(choosing, made.positions, -1).tolist()
    for row, position in enumerate(made.positions):
        if 0 <= position < CONTEXT:
            new = made.new[row, : shape.cached_width].astype(made.index.dtype)
            np.testing.assert_array_equal(made.seen(made.index, row)[-1], new)
        if not choosing[row]:
            assert (out[row] == -7).all()
            continue
        for places, positions in zip(down(made.choice.chosen)[row], made.chosen(row), strict=True):
            expanded = (places[:, None] * shape.block + np.arange(shape.block)).ravel()
            assert expanded[expanded <= position].tolist() == positions.tolist()
        np.testing.assert_allclose(out[row], made.attended(row), atol=2e-5)


def sums_are_exact(name):
    """Whether whole numbers times the factor of the weights are sums of few bits."""
    shape = GPU[name][0]
    return shape.pool is Pool.NONE and (shape.by_head or math.frexp(shape.weight_factor)[0] == 0.5)


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if sums_are_exact(case.values[1])])
def test_of_equal_scores_the_first_are_taken(world, kind, name):
    """Small whole numbers: sums are exact, and many scores are equal, zero and minus zero among them."""
    made = world(kind, name, *some_positions(GPU[name][0]), whole_numbers=True)
    made.run()
    chosen, shape = made.memory.down(made.choice.chosen), made.shape
    for row in (2, 3, 5, 7):
        for places, positions in zip(chosen[row], made.chosen(row), strict=True):
            expanded = (places[:, None] * shape.block + np.arange(shape.block)).ravel()
            assert expanded[expanded < made.positions[row] + 1].tolist() == positions.tolist()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bits_do_not_depend_on_the_other_rows(world, kind, name):
    """One row alone, whose ranges are dealt to blocks, and beside others, whose rows are scored three at a time."""
    positions, sequence = some_positions(GPU[name][0])
    ranges = Ranges(3, 32)
    made = world(kind, name, positions, sequence, at_once=3)
    assert len(positions) > FEW_ROWS
    together = made.run(ranges)
    for row in (2, 5):
        alone = world(kind, name, positions, sequence)
        for field in ("positions", "sequence", "new", "q", "weights", "qkv"):
            value = getattr(alone, field)
            setattr(alone, field, None if value is None else value[row : row + 1])
        alone.index = made.index
        np.testing.assert_array_equal(alone.run(ranges)[0], together[row])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_keys_that_are_no_numbers_are_chosen_last(world, kind, name):
    made = world(kind, name, [CONTEXT - 2, 160], [0, 1])
    made.index[made.table[0, 1], 3] = np.nan
    made.index[made.table[1, 1], 2:5] = np.nan
    made.run()
    for row in (0, 1):
        for places, positions in zip(made.memory.down(made.choice.chosen)[row], made.chosen(row), strict=True):
            expanded = (places[:, None] * made.shape.block + np.arange(made.shape.block)).ravel()
            assert expanded[expanded <= made.positions[row]].tolist() == positions.tolist()


@pytest.mark.parametrize("kind", ["host", pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.shared])])
def test_choices_among_thousands_of_scores(request, monkeypatch, kind):
    """Random scores, then whole numbers of which thousands are equal."""
    if kind == "host":
        request.getfixturevalue("host").install(monkeypatch, indexer)
    shape, memory = HOST["tokens"][0], Memory(kind)
    positions, rng = [8191, 8192, 20000], np.random.default_rng(2)
    scores = np.stack([rng.normal(size=20480), rng.integers(-3, 4, 20480), rng.integers(-2, 3, 20480)])
    scores = scores.astype(np.float32)[:, None]
    for count in (1, 40, 6000):
        arrays = {name: np.zeros(1, np.int32) for name in ("whole", "identity")} | {"scores": scores}
        arrays |= {"choosing": np.array(positions, np.int32), "chosen": np.zeros((3, 1, count), np.int32)}
        choice = Choice(shape, {name: memory.up(array) for name, array in arrays.items()}, 3)
        choice.choose_scored(3)
        for row, position in enumerate(positions):
            expected = best(scores[row, 0, : position + 1], count)
            assert memory.down(choice.chosen)[row, 0].tolist() == expected.tolist()


@pytest.mark.parametrize(("file", "widths"), [(indexer_models.tokens, (48, 48)), (indexer_models.blocks, (64, 64))])
def test_keys_and_scratch_memory_are_planned(monkeypatch, tmp_path, file, widths):
    """Pages hold the keys of indexers, and what they allocate beside is what the plan counts."""
    file, _ = file()
    file.meta["context_length"] = CONTEXT
    path = file.write(tmp_path)
    own = [name for name in file.tensors if name.endswith("indexer.k_norm.weight")]
    with pretended(monkeypatch, path, context_length=CONTEXT, max_sequences=2) as (runner, _):
        machine, plan = runner._machine, runner._machine.weights.plan
        numbers = sum(widths) + indexer_models.INDEX_WIDTH * len(own)
        assert runner.memory_plan().kv_bytes_per_token == 2 * numbers
        assert sum(array.nbytes for layer in machine.cache.layers for array in layer.paged) == (
            machine.cache.n_pages * PAGE * 2 * numbers
        )
        held = [*machine._indexers._choices.values(), *machine._indexers._attention.values()]
        arrays = {id(one): one for part in held for one in vars(part).values() if hasattr(one, "nbytes")}
        assert sum(one.nbytes for one in arrays.values()) == indexer_bytes(plan, CONTEXT) > 0
        longer = indexer_bytes(plan, CONTEXT + PAGE) - indexer_bytes(plan, CONTEXT)
        assert longer == indexer_bytes_per_page(plan)
