"""Kernels of recurrent layers, but for Mamba 1, against the CPU, and the same bits in pieces.

The same tests run the kernels compiled for the CPU (small shapes, thread by thread) and on a GPU.
"""

import numpy as np
import pytest

from engine.cpu.recurrent.convolution import short_convolution
from engine.cpu.recurrent.delta_net import delta_rule, unit_heads
from engine.cpu.recurrent.lightning import decayed_sum
from engine.cpu.recurrent.mamba_2 import grouped_scan
from engine.cuda.recurrent import convolution, delta, lightning, mamba_2
from engine.cuda.recurrent.convolution import Convolution, ConvShape
from engine.cuda.recurrent.delta import Delta, DeltaConstants, DeltaInputs, DeltaShape
from engine.cuda.recurrent.lightning import Lightning, LightningShape
from engine.cuda.recurrent.mamba_2 import Mamba2, Mamba2Constants, Mamba2Shape
from engine.cuda.recurrent.rows import CHUNK, DecodeRows, PromptRows, span_table
from engine.cuda.recurrent.rwkv import rwkv_6, rwkv_7, token_shift
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6Shape
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7Shape
from engine.cuda.recurrent.rwkv.token_shift import shift_job
from tests.support.gpu.host_kernels import HostKernels, Memory
from tests.support.gpu.rwkv_cases import Rwkv6Case, Rwkv7Case, checked_further

TOLERANCE = 2e-5
"""Of the largest value expected: float32 in two orders of sums, over some hundred tokens."""

PLACES, SLOTS, MARKER = 3, 7, np.float32(-777)
EPSILON = 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


class ShortConvCase:
    """A row is b, c and u."""

    def __init__(self, shape, rng):
        self.shape, self.width, self.inner = shape, shape.row, shape.channels
        self.conv = rng.normal(size=(shape.channels, shape.width)).astype(np.float32)

    def run(self, memory, rows, mixed, states, out):
        Convolution(self.shape)(rows, mixed, memory.up(self.conv), None, *states, out)

    def expected(self, mixed, states):
        b, c, u = np.split(mixed, 3, axis=1)
        y, past = short_convolution(b * u, self.conv, None, states[0])
        return c * y, [past]


class Mamba2Case:
    """A row is z, the inputs of the convolution, and dt."""

    def __init__(self, shape, rng):
        self.shape, self.width, self.inner = shape, shape.row_width, shape.inner
        conv = rng.normal(size=(shape.convolved, shape.d_conv)) / 2, rng.normal(size=shape.convolved)
        heads = rng.uniform(-4, 1, shape.heads), -rng.uniform(0.05, 4, shape.heads), rng.normal(size=shape.heads)
        self.conv, self.bias, self.dt_bias, self.a, self.d = (one.astype(np.float32) for one in (*conv, *heads))

    def run(self, memory, rows, mixed, states, out):
        arrays = (memory.up(one) for one in (self.conv, self.bias, self.dt_bias, self.a, self.d))
        convolved = memory.up(np.zeros((len(mixed), self.shape.convolved), np.float32))
        room = memory.up(np.full((len(mixed), self.shape.chunk_width), np.nan, np.float32)) if self.chunks else None
        Mamba2(self.shape)(rows, mixed, Mamba2Constants(*arrays), *states, convolved, out, chunked=room)

    def expected(self, mixed, states):
        s = self.shape
        z, v, dt = np.split(mixed, (s.inner, s.inner + s.convolved), axis=1)
        v, past = short_convolution(v, self.conv, self.bias, states[0])
        u, b, c = np.split(silu(v), (s.inner, s.inner + s.groups * s.d_state), axis=1)
        u, b, c = u.reshape(-1, s.heads, s.head), *(one.reshape(-1, s.groups, s.d_state) for one in (b, c))
        y, state = grouped_scan(u, np.logaddexp(np.float32(0), dt + self.dt_bias), self.a, b, c, states[1])
        return (y + u * self.d[:, None]).reshape(len(mixed), -1) * silu(z), [past, state]


class DeltaCase:
    """A row is q, k and v, then gate, beta and steps."""

    def __init__(self, shape, rng):
        n_steps = shape.inner if shape.key_decays else shape.heads
        assert shape.row == shape.convolved + shape.inner + shape.heads + n_steps
        self.shape, self.width, self.inner = shape, shape.row, shape.inner
        heads = rng.uniform(-4, 1, n_steps), -rng.uniform(0.05, 4, shape.heads), rng.uniform(0.5, 1.5, shape.head)
        conv = rng.normal(size=(shape.convolved, shape.d_conv)) / 2
        self.conv, self.dt_bias, self.a, self.norm = (one.astype(np.float32) for one in (conv, *heads))

    def _parts(self, mixed):
        ends = np.cumsum([self.shape.convolved, self.shape.inner, self.shape.heads]).tolist()
        return [mixed[:, first:end] for first, end in zip(ends, [*ends[1:], mixed.shape[1]], strict=True)]

    def run(self, memory, rows, mixed, states, out):
        arrays = (memory.up(one) for one in (self.conv, self.dt_bias, self.a, self.norm))
        convolved = memory.up(np.zeros((len(mixed), self.shape.convolved), np.float32))
        inputs = DeltaInputs(mixed, *self._parts(mixed))
        room = memory.up(np.full((len(mixed), self.shape.chunk_width), np.nan, np.float32)) if self.chunks else None
        constants = DeltaConstants(*arrays, EPSILON)
        Delta(self.shape)(rows, inputs, constants, *states, convolved, out, chunked=room)

    def expected(self, mixed, states):
        s, n = self.shape, len(mixed)
        gate, beta, steps = self._parts(mixed)
        qkv, past = short_convolution(mixed[:, : s.convolved], self.conv, None, states[0])
        keys, each = s.key_heads * s.head, s.heads // s.key_heads
        q, k, v = (one.reshape(n, -1, s.head) for one in np.split(silu(qkv), (keys, 2 * keys), axis=1))
        epsilon = s.unit_epsilon or EPSILON
        q, k = unit_heads(q, epsilon) / np.float32(s.head**0.5), unit_heads(k, epsilon)
        q, k = (np.repeat(x, each, axis=1) if s.grouped else np.tile(x, (1, each, 1)) for x in (q, k))
        steps, rate = (steps + self.dt_bias).reshape(n, s.heads, -1), self.a[:, None]
        decay = s.floor * sigmoid(steps * rate) if s.floor else np.logaddexp(np.float32(0), steps) * rate
        memory = np.ascontiguousarray(states[1].transpose(0, 2, 1))  # the kernels keep values outermost
        y, memory = delta_rule(q, k, v, np.exp(decay), sigmoid(beta), memory)
        y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + EPSILON) * self.norm
        opened = sigmoid(gate) if s.sigmoid_gate else silu(gate)
        return y.reshape(n, -1) * opened, [past, memory.transpose(0, 2, 1)]


class LightningCase:
    """A row is q, k and v of each head, then numbers that are not read."""

    def __init__(self, shape, rng):
        self.shape, self.width, self.inner = shape, shape.row, shape.inner
        self.decay = rng.uniform(0.5, 1, shape.heads).astype(np.float32)

    def run(self, memory, rows, mixed, states, out):
        Lightning(self.shape)(rows, mixed, memory.up(self.decay), *states, out)

    def expected(self, mixed, states):
        s, n = self.shape, len(mixed)
        q, k, v = np.moveaxis(silu(mixed[:, : 3 * s.inner]).reshape(n, s.heads, 3, s.head), 2, 0)
        memory = np.ascontiguousarray(states[0].transpose(0, 2, 1))  # the kernels keep values outermost
        y, memory = decayed_sum(q, k, v, self.decay, memory)
        return y.reshape(n, -1), [memory.transpose(0, 2, 1)]


CASES = {
    ConvShape: ShortConvCase,
    Mamba2Shape: Mamba2Case,
    DeltaShape: DeltaCase,
    LightningShape: LightningCase,
    Rwkv6Shape: Rwkv6Case,
    Rwkv7Shape: Rwkv7Case,
}


def delta_shape(heads, key_heads, head, d_conv, *, grouped=True, key_decays=False, sigmoid_gate=None, **kind):
    opened = key_decays if sigmoid_gate is None else sigmoid_gate
    convolved, inner = (2 * key_heads + heads) * head, heads * head
    row = convolved + inner + heads + (inner if key_decays else heads)
    return DeltaShape(heads, key_heads, head, d_conv, row, grouped, key_decays, opened, **kind)


HOST_SHAPES = {
    "short": ConvShape(40, 3, 120, gated=True),
    "short odd": ConvShape(33, 4, 99, gated=True),
    "mamba2": Mamba2Shape(heads=4, head=16, groups=2, d_state=16, d_conv=4),
    "mamba2 wide": Mamba2Shape(heads=2, head=80, groups=1, d_state=128, d_conv=4),
    "mamba2 odd": Mamba2Shape(heads=3, head=5, groups=3, d_state=10, d_conv=3),
    "delta": delta_shape(4, 2, 16, 4),
    "delta tiled": delta_shape(4, 2, 64, 4, grouped=False),
    "delta odd": delta_shape(3, 1, 10, 2),
    "kimi": delta_shape(2, 2, 40, 4, key_decays=True),
    "lightning": LightningShape(heads=2, head=40, row=320),
    "lightning odd": LightningShape(heads=3, head=10, row=93),
    "kimi small": delta_shape(1, 1, 16, 4, key_decays=True),
    "delta open": delta_shape(2, 2, 16, 4, sigmoid_gate=True),
    "kimi floor": delta_shape(2, 2, 16, 4, key_decays=True, floor=-5.0, unit_epsilon=1e-6),
    "rwkv6": Rwkv6Shape(heads=2, head=16, channel_mix=True, kv_heads=2, linear=False),
    "rwkv6 linear": Rwkv6Shape(heads=4, head=40, channel_mix=False, kv_heads=2, linear=True),
    "rwkv6 odd": Rwkv6Shape(heads=3, head=10, channel_mix=False, kv_heads=1, linear=False),
    "rwkv7": Rwkv7Shape(heads=4, head=16, channel_mix=True),
    "rwkv7 without norms": Rwkv7Shape(heads=2, head=72, channel_mix=False),
    "rwkv7 odd": Rwkv7Shape(heads=3, head=10, channel_mix=False),
}
GPU_SHAPES = HOST_SHAPES | {
    "short 2048": ConvShape(2048, 3, 6144, gated=True),
    "mamba2 8b": Mamba2Shape(heads=128, head=64, groups=8, d_state=128, d_conv=4),
    "mamba2 heads of 256": Mamba2Shape(heads=2, head=256, groups=2, d_state=128, d_conv=4),
    "mamba2 256 states": Mamba2Shape(heads=24, head=64, groups=1, d_state=256, d_conv=4),
    "delta 9b": delta_shape(32, 16, 128, 4, grouped=False),
    "lightning 96": LightningShape(heads=64, head=96, row=4 * 64 * 96),
    "delta 100": delta_shape(6, 3, 100, 4),
    "kimi 128": delta_shape(32, 32, 128, 4, key_decays=True),
    "rwkv6 7b": Rwkv6Shape(heads=64, head=64, channel_mix=True, kv_heads=64, linear=False),
    "rwkv6 linear 32b": Rwkv6Shape(heads=40, head=128, channel_mix=False, kv_heads=8, linear=True),
    "rwkv7 2.9b": Rwkv7Shape(heads=40, head=64, channel_mix=True),
}
PARAMS = [pytest.param("host", shape, id=f"host-{name}") for name, shape in HOST_SHAPES.items()]
PARAMS += [pytest.param("gpu", shape, id=f"gpu-{name}", marks=pytest.mark.gpu) for name, shape in GPU_SHAPES.items()]
PROMPTS = [pytest.param(*param.values, False, id=param.id, marks=param.marks) for param in PARAMS]
PROMPTS += [
    pytest.param(*param.values, True, id=f"{param.id} in chunks", marks=param.marks)
    for param in PARAMS
    if getattr(param.values[1], "chunk_width", 0)
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels of all host shapes, compiled for the CPU."""
    jobs = [job for shape in HOST_SHAPES.values() for job in shape.build_jobs()]
    return HostKernels(tmp_path_factory.mktemp("host"), [*jobs, shift_job()])


@pytest.fixture
def world(request, monkeypatch):
    """Makes a layer of a shape on "host" or "gpu"."""

    def make(kind, shape, chunks=False):
        if kind == "host":
            modules = convolution, delta, lightning, mamba_2, rwkv_6, rwkv_7, token_shift
            request.getfixturevalue("host").install(monkeypatch, *modules)
        return World(shape, Memory(kind), chunks)

    return make


class World:
    """One layer with random constants, and states that are garbage (NaN) wherever a test puts nothing."""

    def __init__(self, shape, memory, chunks):
        self.memory, self.rng = memory, np.random.default_rng(0)
        self.case = CASES[type(shape)](shape, self.rng)
        self.case.chunks, self.border = chunks, CHUNK if chunks else 1
        self.states = [np.full((SLOTS * PLACES, *one), np.nan, np.float32) for one in shape.state_shapes]

    def at(self, slot, place):
        """The row of a place."""
        return slot * PLACES + place % PLACES

    def inputs(self, rows):
        mixed = self.rng.normal(size=(rows, self.case.width)).astype(np.float32)
        mixed[:, -2::7] += 21.0  # beyond where softplus is the identity
        return mixed

    def remember(self, row):
        for states in self.states:
            states[row] = self.rng.normal(size=states.shape[1:])

    def of(self, row):
        """The states of a row, zeros for None."""
        return [np.zeros_like(one[0]) if row is None else one[row].copy() for one in self.states]

    def run(self, mixed, rows, times=2):
        """Results (rows, E), the same bits each time: what a step that is run again reads is still there."""
        up, down = self.memory.up, self.memory.down
        states, given, runs = [up(one) for one in self.states], up(mixed), []
        for _ in range(times):
            out = up(np.full((len(mixed), self.case.inner), MARKER, np.float32))
            self.case.run(self.memory, rows, given, states, out)
            runs.append([down(one) for one in (out, *states)])
        for first, last in zip(runs[0], runs[-1], strict=True):
            np.testing.assert_array_equal(first, last)
        out, *self.states = runs[0]
        return out

    def decode(self, mixed, positions, offsets):
        tables = (self.memory.up(np.asarray(table, np.int32)) for table in (positions, offsets))
        return self.run(mixed, DecodeRows(*tables, PLACES))

    def prompt(self, mixed, spans, **options):
        return self.run(mixed, PromptRows.of(span_table(spans), self.memory.up), **options)


def close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def check_states(world, before, written):
    """written: by row of states, what must be there; every other row keeps its bits."""
    for number, (states, old) in enumerate(zip(world.states, before, strict=True)):
        for row in range(len(states)):
            if row in written:
                close(states[row], written[row][number])
            else:
                np.testing.assert_array_equal(states[row], old[row])


@pytest.mark.parametrize(("kind", "shape"), PARAMS)
def test_decode(world, kind, shape):
    """Padded rows, every other place and rows that did not run keep their bits."""
    layer = world(kind, shape)
    positions, offsets = [5, -1, 0, 1, 1000001, -1], [0, 1, 2, PLACES - 1, -7, 0, 2]
    for slot, position in enumerate(positions):
        if position > 0:
            layer.remember(layer.at(slot, position + offsets[slot] - 1))
    before, mixed, written = [one.copy() for one in layer.states], layer.inputs(len(positions)), {}
    wanted = {}
    for slot, position in enumerate(positions):
        if position >= 0:
            read = layer.at(slot, position + offsets[slot] - 1) if position else None
            wanted[slot], written[layer.at(slot, position + offsets[slot])] = layer.case.expected(
                mixed[slot : slot + 1], layer.of(read)
            )
    out = layer.decode(mixed, positions, offsets)
    for slot in range(len(positions)):
        if slot in wanted:
            close(out[slot], wanted[slot][0])
        else:
            assert (out[slot] == MARKER).all()
    check_states(layer, before, written)


LENGTHS = {"host": [1, 15, 16, 37], "gpu": [1, 63, 64, 65, 128, 300]}


@pytest.mark.parametrize(("kind", "shape", "chunks"), PROMPTS)
def test_prompt(world, kind, shape, chunks):
    """Several spans at once, with a past and without; what no span names keeps its bits."""
    layer, spans, row = world(kind, shape, chunks), [], 0
    for slot, n in enumerate(LENGTHS[kind]):
        n_past, read, write = (0, 1, 700)[slot % 3], layer.at(slot, slot), layer.at(slot, slot + 1)
        if n_past:
            layer.remember(read)
        spans.append((row, n, n_past, read, write))
        row += n
    before, mixed, written, wanted = [one.copy() for one in layer.states], layer.inputs(row), {}, []
    for first, n, n_past, read, write in spans:
        y, written[write] = layer.case.expected(mixed[first : first + n], layer.of(read if n_past else None))
        wanted.append(y)
    close(layer.prompt(mixed, spans), np.concatenate(wanted))
    check_states(layer, before, written)


PIECES = {"host": [1, 2, 7, 18], "gpu": [1, 2, 7, 64, 65, 161]}


@pytest.mark.parametrize(("kind", "shape", "chunks"), PROMPTS)
def test_how_a_prompt_is_cut_changes_no_bit(world, kind, shape, chunks):
    """In one span, in pieces that end at borders of chunks, beside another prompt, and written where it is read."""
    layer = world(kind, shape, chunks)
    pieces = [16, 32, 21] if kind == "host" and chunks else [length * layer.border for length in PIECES[kind]]
    pieces[-1] -= layer.border // 2
    n = sum(pieces)
    mixed = layer.inputs(n)
    whole = layer.prompt(mixed, [(0, n, 0, 0, layer.at(1, 0))])
    found, first = [], 0
    for number, length in enumerate(pieces):
        same_place = number == len(pieces) - 1
        read = layer.at(0, number)
        write = read if same_place else layer.at(0, number + 1)
        beside = layer.inputs(5)
        batch = np.concatenate((beside, mixed[first : first + length]))
        spans = [(0, 5, 0, 0, layer.at(2, 0)), (5, length, first, read, write)]
        found.append(layer.prompt(batch, spans, times=1)[5:])
        first += length
    np.testing.assert_array_equal(np.concatenate(found), whole)
    for states in layer.states:
        np.testing.assert_array_equal(states[write], states[layer.at(1, 0)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["short 2048", "mamba2 8b", "delta 9b", "kimi 128", "rwkv6 7b", "rwkv7 2.9b"])
def test_rows_of_a_decode_step_do_not_change_each_other(world, name):
    layer = world("gpu", GPU_SHAPES[name])
    for slot in range(SLOTS):
        layer.remember(layer.at(slot, 5))
    mixed, positions, states = layer.inputs(SLOTS), np.full(SLOTS, 6), [one.copy() for one in layer.states]
    every = layer.decode(mixed, positions, np.zeros(SLOTS))
    layer.states, all_states = states, layer.states
    one = layer.decode(mixed[:1], positions[:1], np.zeros(SLOTS))
    np.testing.assert_array_equal(one, every[:1])
    for found, expected in zip(layer.states, all_states, strict=True):
        np.testing.assert_array_equal(found[:PLACES], expected[:PLACES])


@pytest.mark.parametrize("kind", ["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_inputs_that_are_mixed_once_more(world, kind):
    world(kind, HOST_SHAPES["rwkv6"])  # installs the kernels
    close(*checked_further(Memory(kind)))
