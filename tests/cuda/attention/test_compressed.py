"""Attention over a window and compressed blocks, and experts that tokens name, on a GPU against loops in float64."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import PAGE, KvType
from engine.cuda.attention.attention_shape import LayerAttention
from engine.cuda.compressed import blocks
from engine.cuda.compressed.blocks import BlockConstants, Blocks, KeyArrays
from engine.cuda.compressed.plan import BlockShape
from engine.cuda.indexer import indexer
from engine.cuda.indexer.indexer import Rows
from engine.cuda.indexer.plan import range_arrays
from engine.model.batch import Batch, Outputs
from tests.support.gpu.helpers import cpu_logits, decode_logits, generate, nmse, opened, pages_of, token_ids
from tests.support.gpu.host_kernels import HostKernels, Memory
from tests.support.models.compressed_models import HEAD, HEADS, ROTATED, TOKENS, WINDOW, NaiveCompressed, compressed

pytestmark = [pytest.mark.shared]

LIMIT = 1e-5
"""See test_conformance.py: prompts round what products read to float16. With a float16 cache against the CPU's: what
its rounding does to the choice of blocks, 9e-5 of these logits, is the same on both."""

SLOTS = 4


@pytest.fixture(scope="module")
def expected():
    """150 tokens: blocks of 4 and 128 positions, of the first more than are chosen."""
    return NaiveCompressed(compressed()).logits(TOKENS)


def prompt_logits(runner, ids, *, slot, pieces):
    """Logits (T, V) of a prompt that the slot's own pages keep, in pieces of so many tokens."""
    rows, first = [], 0
    with runner._running():
        runner._machine.cache.set_pages(slot, pages_of(runner, slot, np.random.default_rng(0).permutation(16)))
        while first < len(ids):
            piece = np.asarray(ids[first : first + pieces], np.int32)
            rows += list(runner._machine.prompts.all_logits(Batch.build([(slot, piece, first, Outputs.ALL)])))
            first += pieces
    return np.concatenate(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_against_the_formulas(tmp_path, expected, kv_type, capsys):
    ids = np.array(TOKENS)
    with opened(compressed().write(tmp_path), kv_type=kv_type, max_sequences=SLOTS, context_length=256) as runner:
        if kv_type == "f16":
            expected = cpu_logits(runner.model, ids, kv_type)
        whole, single = runner.logits(ids), decode_logits(runner, ids)
        pieces = prompt_logits(runner, ids[:77], slot=2, pieces=7)
        errors = [nmse(one, expected[: len(one)]) for one in (whole, single, pieces)]
        np.testing.assert_array_equal(decode_logits(runner, ids[:30], slot=1), single[:30])
        text = token_ids(generate(runner, ids[:129], 20))
        rows = runner.logits(np.array([*ids[:129], *text]))[128:-1]
        for row, token in zip(rows, text, strict=True):
            assert row.max() - row[token] < 0.02 * np.abs(row).max()
    with capsys.disabled():
        print(f"\ndeepseek4 {kv_type}", *(f"{error:.1e}" for error in errors), end="")
    assert max(errors) < LIMIT, errors


# ---- the kernels by themselves, also compiled for the CPU ----------------------------------------------------------

POSITIONS, PAGES, CONTEXT = 150, 4, 192


def shape_of(name):
    """Layers of the model: a window alone, blocks of 4 with an index that leaves none out, blocks of 128."""
    top = {"window": 0, "blocks of 4": 100, "blocks of 128": 0}[name]
    length = {"window": 0, "blocks of 4": 4, "blocks of 128": 128}[name]
    index = (3, 20) if top else (0, 0)
    return BlockShape(HEADS, HEAD, WINDOW, length, length == 4, *index, top, ROTATED, False, KvType.F32)


SHAPES = {name: shape_of(name) for name in ("window", "blocks of 4", "blocks of 128")}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    jobs = [shape.append_job() for shape in SHAPES.values()]
    jobs += [shape.keys_job() for shape in SHAPES.values() if shape.length]
    jobs += [job for shape in SHAPES.values() for job in shape.attention_jobs()]
    return HostKernels(tmp_path_factory.mktemp("host"), jobs)


def softmax_sum(values, gates):
    shares = np.exp(gates - gates.max(axis=0))
    return (shares / shares.sum(axis=0) * values).sum(axis=0)


class Layer:
    """Random keys, and what blocks are made of, of one sequence; expectations in float64."""

    def __init__(self, shape, memory):
        rng = np.random.default_rng(0)
        self.shape, self.memory, up = shape, memory, memory.up
        self.inv_freq = 500.0 ** (-np.arange(ROTATED // 2) / ROTATED)
        self.keys, self.q = rng.normal(size=(POSITIONS, HEAD)), rng.normal(size=(POSITIONS, HEADS * HEAD))
        self.left = rng.normal(size=(POSITIONS, shape.left))
        self.sinks = rng.normal(size=HEADS).astype(np.float32)
        self.parts = [
            (rng.normal(size=(shape.length, gates)), rng.uniform(0.5, 1.5, width), width)
            for gates, width in zip(shape.gates, (HEAD, shape.index_width), strict=True)
            if gates
        ]
        arrays = [
            KeyArrays(up(ape.astype(np.float32)), up(weight.astype(np.float32)), 1e-5) for ape, weight, _ in self.parts
        ]
        self.constants = BlockConstants(
            *[*arrays, None, None][:2], up(self.inv_freq), 1.0,
            LayerAttention(scale=HEAD**-0.5, sinks=up(self.sinks)),
        )  # fmt: skip

    def turned(self, x, position):
        out, angles = x.copy(), position * self.inv_freq
        first, second = x[-ROTATED::2], x[1 - ROTATED :: 2]
        out[-ROTATED::2] = first * np.cos(angles) - second * np.sin(angles)
        out[1 - ROTATED :: 2] = first * np.sin(angles) + second * np.cos(angles)
        return out

    def block_key(self, part, number):
        """Of attention (part 0) or of the index."""
        length, (ape, weight, width) = self.shape.length, self.parts[part]
        gates, start = ape.shape[1], part * 2 * self.shape.gates[0]
        rows = self.left[number * length : (number + 1) * length, start : start + 2 * gates]
        values, given = rows[:, gates - width : gates], rows[:, 2 * gates - width :] + ape[:, gates - width :]
        if self.shape.overlap and number:
            before = self.left[(number - 1) * length : number * length, start : start + 2 * gates]
            values = np.concatenate((before[:, :width], values))
            given = np.concatenate((before[:, gates : gates + width] + ape[:, :width], given))
        pooled = softmax_sum(values, given)
        return self.turned(pooled / np.sqrt((pooled**2).mean() + 1e-5) * weight, number * length)

    def attended(self, position):
        n = (position + 1) // self.shape.length if self.shape.length else 0
        blocks = [self.block_key(0, number) for number in range(n)]
        keys = np.array([*self.keys[max(0, position + 1 - WINDOW) : position + 1], *blocks])
        weights = np.exp(self.q[position].reshape(HEADS, HEAD) @ keys.T / np.sqrt(HEAD))
        weights /= weights.sum(axis=1, keepdims=True) + np.exp(self.sinks)[:, None]
        return (weights @ keys).reshape(-1)

    def run(self, steps):
        """Attention of all positions, which come in steps of so many rows; the cache behind them."""
        up, down, shape = self.memory.up, self.memory.down, self.shape
        cache = SimpleNamespace(
            keys=up(np.zeros((PAGES, PAGE + shape.block_rows, HEAD), np.float32)),
            left=up(np.zeros((PAGES, PAGE, shape.left), np.float32)),
            index_keys=up(np.zeros((PAGES, shape.block_rows, shape.index_width), np.float32)),
        )
        ranges = shape.ranges(CONTEXT, 4)
        sizes = range_arrays(shape.attention, ranges)
        choice = None
        if shape.index is not None:
            integers = {name: up(np.full(POSITIONS, -1, np.int32)) for name in ("choosing", "chosen")}
            choice = SimpleNamespace(**integers)
        memory = {name: up(np.zeros(size, np.float32)) for name, size in sizes.items()}
        kernels = Blocks(shape, ranges, CONTEXT, memory, choice)
        table, found, first = up(np.array([[2, 0, 3]], np.int32)), [], 0
        width = shape.attention.row_width
        for n in steps:
            end = first + n
            qkv = np.zeros((n, width), np.float32)
            qkv[:, : HEADS * HEAD], qkv[:, HEADS * HEAD : (HEADS + 1) * HEAD] = self.q[first:end], self.keys[first:end]
            qkv, left = up(qkv), up(self.left[first:end].astype(np.float32))
            rows = Rows(up(np.arange(first, end, dtype=np.int32)), table, up(np.zeros(n, np.int32)))
            out = up(np.zeros((n, HEADS * HEAD), np.float32))
            kernels.append(qkv[:, HEADS * HEAD : (HEADS + 1) * HEAD], left, self.constants, cache, rows)
            kernels.attend(qkv, self.constants, cache, rows, out)
            found.append(down(out))
            first = end
        return np.concatenate(found), cache


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_kernels(request, monkeypatch, kind, name):
    """Single rows and pieces: the same bits, and those of the formulas; keys of blocks are where they are sought."""
    if kind == "host":
        request.getfixturevalue("host").install(monkeypatch, blocks, indexer)
    layer = Layer(SHAPES[name], Memory(kind))
    whole, cache = layer.run([1, 2, 4, 7, 3, 45, 66, 22])
    expected = np.array([layer.attended(position) for position in range(POSITIONS)])
    assert np.abs(whole - expected).max() < 2e-5 * np.abs(expected).max()
    again, _ = layer.run([5, 60, 1, 63, 21])
    np.testing.assert_array_equal(again, whole)
    if layer.shape.index is not None:
        keys = layer.memory.down(cache.index_keys)
        for number in (0, 1, 15, 16, 36):
            page = [2, 0, 3][number // 16]
            np.testing.assert_allclose(keys[page, number % 16], layer.block_key(1, number), atol=1e-5)
