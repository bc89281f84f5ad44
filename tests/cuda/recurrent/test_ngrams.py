"""Kernels of tables of n-grams against the CPU: decode steps, prompts in pieces and beside others, ends of sequences.

The same tests run the kernels compiled for the CPU and on a GPU. Products are not part of them.
"""

import numpy as np
import pytest

from engine.cpu.recurrent.convolution import short_convolution
from engine.cpu.recurrent.ngrams import table_rows
from engine.cuda.recurrent.ngrams import ngrams
from engine.cuda.recurrent.ngrams.ngrams import NgramConstants, Ngrams, NgramShape
from engine.cuda.recurrent.rows import DecodeRows, PromptRows, span_table
from engine.model.config import LEAST_GATE, NgramConfig
from tests.support.gpu.host_kernels import HostKernels, Memory

PLACES, SLOTS, MARKER, END = 3, 5, -7, 4
EPSILONS = (1e-5, 1e-6, 1e-4)
TOLERANCE = 2e-6
"""Of the largest value expected: float32 in two orders of sums."""

SHAPES = {
    "three": NgramShape(length=3, heads=2, taps=4, channels=3 * 40, columns=40),
    "two": NgramShape(length=2, heads=5, taps=2, channels=300, columns=300),
    "five": NgramShape(length=5, heads=3, taps=3, channels=2 * 33, columns=33),
}
PARAMS = [
    pytest.param((kind, shape), id=f"{kind}-{name}", marks=pytest.mark.gpu if kind == "gpu" else ())
    for kind in ("host", "gpu")
    for name, shape in SHAPES.items()
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostKernels(
        tmp_path_factory.mktemp("host"), [job for shape in SHAPES.values() for job in shape.build_jobs()]
    )


@pytest.fixture
def layer(request, monkeypatch):
    kind, shape = request.param
    if kind == "host":
        request.getfixturevalue("host").install(monkeypatch, ngrams)
    return Layer(shape, Memory(kind))


def unit(x, epsilon):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(epsilon))


class Layer:
    """Random constants with multipliers of all 64 bits, and states that are garbage (NaN) where a test puts nothing."""

    def __init__(self, shape, memory):
        self.shape, self.memory, self.rng = shape, memory, np.random.default_rng(0)
        rng, up = self.rng, memory.up
        self.config = NgramConfig(
            length=shape.length,
            heads=shape.heads,
            width=1,
            conv_width=shape.taps,
            channels=shape.channels,
            end=END,
            multipliers=tuple(rng.integers(2**63, 2**64 - 1, shape.length, np.uint64).tolist()),
            offsets=tuple(range(0, 100 * shape.rows, 100)),
            sizes=tuple(rng.integers(1, 100, shape.rows).tolist()),
        )
        self.norms = rng.uniform(0.5, 1.5, (3, shape.channels)).astype(np.float32)
        self.conv = rng.normal(size=(shape.channels, shape.taps)).astype(np.float32)
        numbers = np.array([*self.config.multipliers, *self.config.sizes, *self.config.offsets], np.uint64)
        self.kept = NgramConstants(up(numbers), END, up(self.norms), EPSILONS, LEAST_GATE, up(self.conv))
        self.states = [np.full((SLOTS * PLACES, *one), np.nan, np.float32) for one in shape.state_shapes]

    def inputs(self, rows):
        """Tokens, some of which end sequences, products, and x. The first row's keys are zero: its gate is a half."""
        tokens = self.rng.choice([1, 2, END, 70000], rows).astype(np.int32)
        products = self.rng.normal(size=(rows, self.shape.channels + self.shape.columns)).astype(np.float32)
        products[:1, : self.shape.channels] = 0.0
        return tokens, products, self.rng.normal(size=(rows, self.shape.channels)).astype(np.float32)

    def remember(self, row, tokens):
        self.states[0][row] = self.rng.normal(size=self.states[0].shape[1:])
        self.states[1][row] = ([0] * self.shape.length + [token + 1 for token in tokens])[-(self.shape.length - 1) :]

    def of(self, row):
        return [np.zeros_like(one[0]) if row is None else one[row].copy() for one in self.states]

    def run(self, given, rows):
        """Rows of the table, x behind the step; the states are changed. Twice: a step may be run again."""
        up, down, found = self.memory.up, self.memory.down, []
        states, (tokens, products, x) = [up(one) for one in self.states], given
        # What a span reads and writes is in one row only in tests that run once.
        for _ in range(self.times):
            kernels, new = Ngrams(self.shape), up(x)
            tokens, chosen = up(tokens), up(np.full((len(x), self.shape.rows), MARKER, np.int32))
            inputs = up(np.full_like(x, np.nan))
            kernels.choose(rows, tokens, self.kept, states[1], chosen)
            kernels.gate(up(products), self.kept, new, inputs)
            kernels.convolve(rows, inputs, self.kept, states[0], new)
            kernels.keep(rows, tokens, inputs, *states)
            found.append([down(one) for one in (chosen, new, *states)])
            tokens = down(tokens)
        for first, last in zip(found[0], found[-1], strict=True):
            np.testing.assert_array_equal(first, last)
        chosen, new, *self.states = found[0]
        return chosen, new

    def expected(self, given, states):
        """Rows, x and the states behind the rows of one sequence, as engine/cpu/recurrent/ngrams.py computes them."""
        s, (tokens, products, x) = self.shape, given
        rows = table_rows(self.config, tokens.astype(np.int64), states[1].astype(np.int64) - 1)
        streams = len(x), s.channels // s.columns, s.columns
        norms = self.norms.reshape(3, 1, *streams[1:])
        key = unit(products[:, : s.channels].reshape(streams), EPSILONS[0]) * norms[0]
        score = (key * unit(x.reshape(streams), EPSILONS[1]) * norms[1]).sum(axis=-1) / np.sqrt(np.float32(s.columns))
        gate = 1 / (1 + np.exp(-np.sign(score) * np.sqrt(np.maximum(np.abs(score), LEAST_GATE))))
        gated = products[:, None, s.channels :] * gate[..., None]
        inputs = (unit(gated, EPSILONS[2]) * norms[2]).reshape(x.shape)
        convolved, past = short_convolution(inputs, self.conv, None, np.ascontiguousarray(states[0].T), s.length)
        known = np.concatenate((states[1], tokens + 1))[-(s.length - 1) :]
        return rows, x + gated.reshape(x.shape) + convolved / (1 + np.exp(-convolved)), [past.T, known]

    def prompt(self, given, spans, times=2):
        self.times = times
        return self.run(given, PromptRows.of(span_table(spans), self.memory.up))


def close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def check(layer, before, written):
    """States in the rows of `written`; all others keep their bits."""
    for number, (states, old) in enumerate(zip(layer.states, before, strict=True)):
        for row in range(len(states)):
            if row in written:
                close(states[row], written[row][number])
            else:
                np.testing.assert_array_equal(states[row], old[row])


def part(given, first, end):
    return tuple(one[first:end] for one in given)


@pytest.mark.parametrize("layer", PARAMS, indirect=True)
def test_decode(layer):
    """Padded rows read no row of the table, and leave every state as it is."""
    layer.times = 2
    positions, offsets = [0, 1, -1, 7, 1000001], [2, 0, 0, -5, 1]
    places = [slot * PLACES + (positions[slot] + offsets[slot]) % PLACES for slot in range(SLOTS)]
    reads = [slot * PLACES + (positions[slot] + offsets[slot] - 1) % PLACES for slot in range(SLOTS)]
    for slot, tokens in ((1, [3]), (3, [3, END, 70000, 1]), (4, [9, 9, 9, 9])):
        layer.remember(reads[slot], tokens)
    before, given = [one.copy() for one in layer.states], layer.inputs(SLOTS)
    wanted = {
        slot: layer.expected(part(given, slot, slot + 1), layer.of(reads[slot] if positions[slot] else None))
        for slot in range(SLOTS)
        if positions[slot] >= 0
    }
    tables = (layer.memory.up(np.asarray(table, np.int32)) for table in (positions, offsets))
    chosen, x = layer.run(given, DecodeRows(*tables, PLACES))
    assert (chosen[2] == -1).all()
    for slot, (rows, one, _) in wanted.items():
        np.testing.assert_array_equal(chosen[slot], rows[0])
        close(x[slot], one[0])
    check(layer, before, {places[slot]: found[2] for slot, found in wanted.items()})


@pytest.mark.parametrize("layer", PARAMS, indirect=True)
def test_prompts(layer):
    """Spans of every length, with a past, with one shorter than an n-gram, and without."""
    spans, row, written, rows, xs = [], 0, {}, [], []
    for slot, (n, past) in enumerate([(1, []), (2, [5]), (7, [3, END, 1, 2]), (8, []), (37, [1, 2, 3, 70000])]):
        read, write = slot * PLACES, slot * PLACES + 1
        if past:
            layer.remember(read, past)
        spans.append((row, n, len(past), read, write))
        row += n
    before, given = [one.copy() for one in layer.states], layer.inputs(row)
    for first, n, n_past, read, write in spans:
        found = layer.expected(part(given, first, first + n), layer.of(read if n_past else None))
        written[write] = found[2]
        rows.append(found[0])
        xs.append(found[1])
    chosen, x = layer.prompt(given, spans)
    np.testing.assert_array_equal(chosen, np.concatenate(rows))
    close(x, np.concatenate(xs))
    check(layer, before, written)


@pytest.mark.parametrize("layer", PARAMS, indirect=True)
def test_how_a_prompt_is_cut_changes_no_bit(layer):
    """In one span, and in pieces beside another prompt that write where they read."""
    pieces = [1, 2, 1, 8, 3, 21]
    given = layer.inputs(sum(pieces))
    whole = layer.prompt(given, [(0, sum(pieces), 0, 0, PLACES)])
    found, first = [], 0
    for n in pieces:
        beside = layer.inputs(5)
        batch = tuple(np.concatenate(pair) for pair in zip(beside, part(given, first, first + n), strict=True))
        spans = [(0, 5, 0, 0, 2 * PLACES), (5, n, first, 0, 0)]
        found.append([one[5:] for one in layer.prompt(batch, spans, times=1)])
        first += n
    for number in range(2):
        np.testing.assert_array_equal(np.concatenate([one[number] for one in found]), whole[number])
    for states in layer.states:
        np.testing.assert_array_equal(states[0], states[PLACES])
