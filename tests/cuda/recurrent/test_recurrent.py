"""Convolution and scan of Mamba layers against float64, and bit for bit however prompts are cut and steps repeated.

The same tests run the kernels compiled for the CPU (small shapes, thread by thread) and on a GPU.
"""

import copy

import numpy as np
import pytest

from engine.cuda.recurrent import convolution, mamba
from engine.cuda.recurrent.mamba import Mamba
from engine.cuda.recurrent.mamba_plan import MambaShape
from engine.cuda.recurrent.rows import DecodeRows, PromptRows, chunks_of, conv_tiles, span_table
from tests.support.gpu.host_kernels import HostKernels, Memory
from tests.support.gpu.recurrent_reference import MambaWeights, convolve64, scan64

TOLERANCE = 1e-5
"""Of the largest value expected: float32 against float64 over some hundred tokens."""

PLACES, MARKER = 3, np.float32(-777)
HOST_SHAPES = [
    MambaShape(64, 16, 4, 4),
    MambaShape(100, 8, 2, 12),
    MambaShape(33, 10, 3, 3),  # nothing is a multiple of four
    MambaShape(20, 48, 8, 5),
    MambaShape(5, 256, 4, 4),
]
GPU_SHAPES = [
    MambaShape(64, 16, 4, 4),
    MambaShape(100, 8, 2, 12),
    MambaShape(100, 64, 8, 5),
    MambaShape(5120, 16, 4, 160),
    MambaShape(5120, 8, 4, 160),
    MambaShape(5120, 64, 3, 160),
    MambaShape(33, 10, 3, 3),
    MambaShape(5, 256, 4, 4),
]
CASES = [pytest.param("host", shape, id=f"host-{shape.d_inner}-{shape.d_state}") for shape in HOST_SHAPES]
CASES += [
    pytest.param("gpu", shape, id=f"gpu-{shape.d_inner}-{shape.d_state}", marks=pytest.mark.gpu) for shape in GPU_SHAPES
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels of all host shapes, compiled for the CPU."""
    return HostKernels(tmp_path_factory.mktemp("host"), [job for shape in HOST_SHAPES for job in shape.build_jobs()])


@pytest.fixture
def kernels(request, monkeypatch):
    """Makes kernels of a shape on "host" or "gpu", with their memory."""

    def make(kind, shape):
        if kind == "host":
            request.getfixturevalue("host").install(monkeypatch, convolution, mamba)
        return Mamba(shape, most_rows=2 if kind == "host" else None), Memory(kind)

    return make


class World:
    """One layer with random weights and states that are garbage (NaN) wherever a test puts nothing.

    Behind the rings of the slots there are two more states, as of a pool of checkpoints.
    """

    def __init__(self, made, slots, seed=0):
        self.kernels, self.memory = made
        shape, self.rng = self.kernels.shape, np.random.default_rng(seed)
        self.shape, self.places = shape, PLACES
        self.weights = MambaWeights.random(self.rng, shape.d_inner, shape.d_state, shape.d_conv)
        self.conv = np.full((slots * self.places + 2, shape.d_inner, shape.d_conv - 1), np.nan, np.float32)
        self.ssm = np.full((slots * self.places + 2, shape.d_inner, shape.d_state), np.nan, np.float32)

    def at(self, slot, place):
        """The row of a place."""
        return slot * self.places + place % self.places

    def inputs(self, rows):
        """xz, dt and the product of ssm_x for so many rows; what stands for no row may be anything."""
        shape = self.shape
        widths = 2 * shape.d_inner, shape.d_inner, shape.row_width
        xz, dt, bc = (self.rng.normal(size=(rows, width)).astype(np.float32) for width in widths)
        dt[:, ::7] += 21.0  # beyond where softplus is the identity
        dt[:, 1::7] -= 5.0
        return xz, dt - 1.0, bc

    def remember(self, state):
        """A random state."""
        self.conv[state] = self.rng.normal(size=self.conv.shape[1:])
        self.ssm[state] = self.rng.normal(size=self.ssm.shape[1:])

    def _run(self, inputs, rows, times=2):
        """Outputs of both kernels (rows, E); the rings hold what they left.

        The same bits each time: what a step that is run again reads is still there. The last run writes where dt is.
        """
        w, n, up, down = self.weights, len(inputs[0]), self.memory.up, self.memory.down
        xz, dt, bc, weight, bias, a, d = map(up, (*inputs, w.conv, w.bias, w.a, w.d))
        rings = up(self.conv.copy()), up(self.ssm.copy())
        x, out = (up(np.full((n, self.shape.d_inner), MARKER, np.float32)) for _ in range(2))
        runs = []
        for run in range(times):
            self.kernels.convolve(rows, xz, weight, bias, rings[0], x)
            target = dt if run > 0 else out
            self.kernels.scan(rows, dt, x, bc, xz, a, d, rings[1], target)
            written = down(x) != MARKER
            runs.append([down(array) for array in (x, *rings)] + [np.where(written, down(target), MARKER)])
        for first, last in zip(runs[0], runs[-1], strict=True):
            same(last, first)
        x, self.conv, self.ssm, out = runs[0]
        return x, out

    def decode(self, inputs, positions, offsets):
        tables = (self.memory.up(np.asarray(table, np.int32)) for table in (positions, offsets))
        return self._run(inputs, DecodeRows(*tables, self.places))

    def prompt(self, inputs, spans, **options):
        return self._run(inputs, PromptRows.of(span_table(spans), self.memory.up), **options)

    def expected(self, inputs, row, n_rows, x, state):
        """Outputs of these rows and the states behind them, from a state; None: from zero.

        x: what the convolution really gave, so that its rounding does not count twice.
        """
        xz, dt, bc = (array[row : row + n_rows] for array in inputs)
        e, rank, n = self.shape.d_inner, self.shape.dt_rank, self.shape.d_state
        rings = self.conv, self.ssm
        conv, ssm = (np.zeros_like(states[0]) if state is None else states[state] for states in rings)
        u, past = convolve64(self.weights, conv, xz[:, :e])
        b, c = bc[:, rank : rank + n], bc[:, rank + n :]
        out, behind = scan64(self.weights, ssm, dt, x[row : row + n_rows], b, c, xz[:, e:])
        return u, out, past, behind


def close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def same(found, expected):
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_decode(kernels, kind, shape):
    """Every row against float64; padded rows, every other place and rows that did not run keep their bits."""
    slots, rows = 9, 7
    world = World(kernels(kind, shape), slots)
    places = world.places
    positions = [5, -1, 0, 1, 1000001, 64, -1]
    offsets = [0, 1, 2, places - 1, -7, 0, 2, 5, 5]
    write = [world.at(slot, position + offsets[slot]) for slot, position in enumerate(positions)]
    read = [world.at(slot, position + offsets[slot] - 1) for slot, position in enumerate(positions)]
    for slot in range(rows):
        if positions[slot] > 0:
            world.remember(read[slot])
    before, inputs = copy.copy(world), world.inputs(rows)
    x, out = world.decode(inputs, positions, offsets)
    conv, ssm = before.conv.copy(), before.ssm.copy()
    for slot, position in enumerate(positions):
        if position < 0:
            assert (x[slot] == MARKER).all()
            assert (out[slot] == MARKER).all()
            continue
        u, y, past, state = before.expected(inputs, slot, 1, x, read[slot] if position else None)
        close(x[slot], u[0])
        close(out[slot], y[0])
        same(world.conv[write[slot]], past.astype(np.float32))
        close(world.ssm[write[slot]], state)
        conv[write[slot]], ssm[write[slot]] = world.conv[write[slot]], world.ssm[write[slot]]
    same(world.conv, conv)
    same(world.ssm, ssm)


LENGTHS = {"host": [1, 2, 7, 65, 9], "gpu": [1, 2, 7, 64, 65, 300, 8, 17]}


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_prompt(kernels, kind, shape):
    """Several spans at once, with a past and without; rows between them, read places and other slots stay."""
    lengths = LENGTHS[kind]
    world = World(kernels(kind, shape), len(lengths) + 1)
    spans, row = [], 0
    for i, n in enumerate(lengths):
        n_past = (0, 1, 700)[i % 3]
        read, write = world.at(i, i), world.at(i, i + 1)
        if n_past:
            world.remember(read)
        spans.append((row, n, n_past, read, write))
        row += n + (i == 1)  # a row that is in no span
    before, inputs = copy.copy(world), world.inputs(row)
    x, out = world.prompt(inputs, spans)
    conv, ssm, named = before.conv.copy(), before.ssm.copy(), np.zeros(row, bool)
    for first, n, n_past, read, write in spans:
        rows = slice(first, first + n)
        u, y, past, state = before.expected(inputs, first, n, x, read if n_past else None)
        close(x[rows], u)
        close(out[rows], y)
        same(world.conv[write], past.astype(np.float32))
        close(world.ssm[write], state)
        conv[write], ssm[write], named[rows] = world.conv[write], world.ssm[write], True
    assert not named.all()
    assert (x[~named] == MARKER).all()
    assert (out[~named] == MARKER).all()
    same(world.conv, conv)
    same(world.ssm, ssm)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_prompt_may_write_where_it_reads(kernels, kind, shape):
    """The second batch of a work item that is too long for one, of one tile or more."""
    lengths = (1, 3, 8, 9, 30)
    world, row = World(kernels(kind, shape), len(lengths)), 0
    spans = []
    for slot, n in enumerate(lengths):
        world.remember(world.at(slot, 1))
        spans.append((row, n, 5, world.at(slot, 1)))
        row += n
    inputs, other = world.inputs(row), copy.copy(world)
    expected = other.prompt(inputs, [(*span, span[-1] - 1) for span in spans])
    found = world.prompt(inputs, [(*span, span[-1]) for span in spans], times=1)
    for one, two in zip(found, expected, strict=True):
        same(one, two)
    for *_, state in spans:
        same(world.conv[state], other.conv[state - 1])
        same(world.ssm[state], other.ssm[state - 1])


PIECES = {"host": [1, 2, 7, 18, 12], "gpu": [1, 2, 7, 64, 65, 161]}


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_how_a_prompt_is_cut_changes_no_bit(kernels, kind, shape):
    """In one span, in pieces, and token by token as decode steps; the last in another slot among other rows."""
    pieces = PIECES[kind]
    n, world = sum(pieces), World(kernels(kind, shape), 3)
    places = world.places
    inputs = world.inputs(n)
    whole = world.prompt(inputs, [(0, n, 0, 0, world.at(1, 0))])
    states = world.conv[world.at(1, 0)], world.ssm[world.at(1, 0)]
    found, first, place = [], 0, 0
    for length in pieces:
        part = [array[first : first + length] for array in inputs]
        found.append(world.prompt(part, [(0, length, first, world.at(0, place), world.at(0, place + 1))]))
        first, place = first + length, (place + 1) % places
    for one, expected in zip(zip(*found, strict=True), whole, strict=True):
        same(np.concatenate(one), expected)
    same(world.conv[place], states[0])
    same(world.ssm[place], states[1])
    others, steps = world.inputs(3), range(n)
    for t in steps if kind == "gpu" else steps[:20]:
        for array, given in zip(others, inputs, strict=True):
            array[2] = given[t]
        x, out = world.decode(others, [-1, t, t], [0, 0, 1])
        same(x[2], whole[0][t])
        same(out[2], whole[1][t])
    if kind == "gpu":
        same(world.ssm[world.at(2, n)], states[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 256])
def test_rows_of_a_decode_step_do_not_change_each_other(rows):
    """However many rows a block takes in turn."""
    world = World((Mamba(MambaShape(1000, 16, 4, 32)), Memory("gpu")), 256)
    for slot in range(256):
        world.remember(world.at(slot, 5))
    inputs = world.inputs(256)
    some = copy.copy(world)
    positions, offsets = np.full(256, 6), np.zeros(256)
    positions[3::5] = -1
    every = world.decode(inputs, positions, offsets)
    found = some.decode([array[:rows] for array in inputs], positions[:rows], offsets)
    same(found[0], every[0][:rows])
    same(found[1], every[1][:rows])
    same(some.ssm[: PLACES * rows], world.ssm[: PLACES * rows])
    assert np.isnan(some.ssm[PLACES * rows :: PLACES]).all()


@pytest.mark.gpu
def test_states_move_to_a_pool_and_back():
    """The kernel that copies pages copies states between the rings and the pool behind them."""
    import cupy

    from engine.cuda.driver.launch import launch
    from engine.cuda.driver.staging import addresses, kernel

    rng = np.random.default_rng(0)
    arrays = [cupy.asarray(rng.normal(size=(9, 100, each)).astype(np.float32)) for each in (3, 16)]
    before = [array.get() for array in arrays]
    sizes = cupy.asarray([100 * 3 * 4, 100 * 16 * 4], np.int64)
    for pairs in ([(5, 7), (2, 8)], [(7, 1), (8, 0)]):
        at = cupy.asarray(addresses(arrays))
        args = (at, at, sizes, cupy.asarray(pairs, np.int32))
        launch(kernel("copy_pages"), (len(pairs), 2), 256, args, pdl=False)
    for array, old in zip(arrays, before, strict=True):
        old[[7, 8]] = old[[5, 2]]
        old[[1, 0]] = old[[7, 8]]
        same(array.get(), old)


def test_what_a_span_table_refuses():
    with pytest.raises(AssertionError, match="write the same state"):
        span_table([(0, 4, 0, 0, 1), (4, 4, 4, 0, 1)])
    with pytest.raises(AssertionError, match="without rows"):
        span_table([(0, 0, 0, 0, 1)])
    assert span_table([]).shape == (0, 5)
    assert conv_tiles(span_table([])).shape == (0, 2)
    tiles = conv_tiles(span_table([(0, 8, 0, 0, 0), (8, 17, 3, 0, 1)]))
    assert tiles.tolist() == [[0, 0], [1, 0], [1, 8], [1, 16]]
    assert chunks_of(span_table([])).shape == (0, 2)
    chunks = chunks_of(span_table([(0, 16, 0, 0, 0), (16, 17, 15, 0, 1), (33, 15, 33, 0, 2), (48, 1, 31, 0, 3)]))
    assert chunks.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [3, 0]]
