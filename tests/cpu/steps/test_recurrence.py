"""Compiled recurrent mixers against their formulas in numpy, and the same bits however a prompt is cut."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.cpu.memory import aligned_empty
from engine.cpu.recurrent.convolution import short_convolution
from engine.cpu.recurrent.delta_net import delta_heads
from engine.cpu.recurrent.mamba import gated_output, selective_scan
from engine.cpu.recurrent.mamba_2 import scan_heads
from engine.cpu.recurrent.tools import Heads, softplus
from engine.cpu.reference import sigmoid
from engine.cpu.steps.immediate import Immediate
from engine.cpu.steps.protocol import StateRow
from engine.cpu.steps.recurrence import CompiledRecurrence
from engine.cpu.steps.recurrent_steps import After, convolve_step, scan_step, selective_step
from engine.cpu.threads import ThreadPool

TOLERANCE = 2e-6
"""Of the largest value: float32 sums in another order."""

LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129]


@pytest.fixture(scope="module")
def kernels():
    return CompiledRecurrence(Immediate(ThreadPool(2)))


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()


def check(run, formula, arrays, shared, state):
    """run, formula: (arrays of tokens..., shared..., state) to (results, state behind), whole and in three pieces."""
    whole = run(*arrays, *shared, state)
    close(whole, formula(*arrays, *shared, state))
    n, parts, behind = len(arrays[0]), [], state
    for first, end in ((0, n // 3), (n // 3, n // 3 + 1), (n // 3 + 1, n)):
        if first < end:
            y, behind = run(*(np.ascontiguousarray(one[first:end]) for one in arrays), *shared, behind)
            parts.append(y)
    np.testing.assert_array_equal(np.concatenate(parts), whole[0])
    np.testing.assert_array_equal(behind, whole[1])


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(
    ("heads", "key_heads", "keys", "values", "grouped", "per_key"),
    [(4, 2, 16, 16, True, False), (4, 2, 32, 64, False, False), (3, 3, 48, 48, True, True)],
)
def test_delta_rules(kernels, n, heads, key_heads, keys, values, grouped, per_key):
    rng, divided = np.random.default_rng(n), Heads(key_heads, grouped, 1e-6)
    shapes = (n, 2 * key_heads * keys + heads * values), (heads, keys, values)
    rows, state = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    decay = np.exp(-rng.gamma(0.5, 2.0, (n, heads, keys if per_key else 1))).astype(np.float32)
    beta = rng.uniform(0, 1, (n, heads)).astype(np.float32)

    def run(rows, decay, beta, state):
        return kernels.delta_rule(rows, divided, decay, beta, state)

    def formula(rows, decay, beta, state):
        return delta_heads(rows, divided, decay, beta, state)

    check(run, formula, (rows, decay, beta), (), state)


def compiled(make_step, shape, state):
    """What a step gives that reads a state and writes the one behind it: make_step(state row, out)."""
    out, behind = np.empty(shape, np.float32), aligned_empty(*state.shape)
    row = StateRow(behind, state, np.array([-1, 0], np.int64))
    with ThreadPool(2) as pool:
        Immediate(pool).recur(make_step(row, out), out, state, row)
    return out, behind


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("heads", "groups", "width", "states"), [(4, 2, 16, 16), (6, 1, 32, 128)])
def test_scans_of_mamba_2(n, heads, groups, width, states):
    """Steps and gates are parts of longer rows."""
    rng = np.random.default_rng(n)
    shapes = (n, heads * width + 2 * groups * states), (n, heads * width + heads), (heads, width, states)
    rows, inputs, state = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    d, bias = (rng.normal(size=heads).astype(np.float32) for _ in range(2))
    a = -rng.gamma(1.0, 1.0, heads).astype(np.float32)

    def run(rows, inputs, state):
        z, steps = inputs[:, :-heads], inputs[:, -heads:]
        shape = len(rows), heads, width
        return compiled(lambda row, out: scan_step(rows, groups, steps, z, (a, d, bias), row, out), shape, state)

    def formula(rows, inputs, state):
        y, behind = scan_heads(rows, groups, softplus(inputs[:, -heads:] + bias), a, d, state)
        z = inputs[:, :-heads].reshape(y.shape)
        return y * z * sigmoid(z), behind

    check(run, formula, (rows, inputs), (), state)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("inner", "states"), [(16, 16), (48, 64)])
def test_scans_of_mamba_1(n, inner, states):
    rng = np.random.default_rng(n)
    shapes = (n, 3 * inner + 2 * states), (inner,), (inner, states)
    rows, d, state = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    a = -rng.gamma(1.0, 1.0, (inner, states)).astype(np.float32)
    weights = SimpleNamespace(a=a, d=d)

    def parts(rows):
        whole = np.split(rows, (inner, 2 * inner, 3 * inner, 3 * inner + states), axis=1)
        return [np.ascontiguousarray(one) for one in whole[:2]] + whole[2:]

    def run(rows, state):
        u, steps, z, b, c = parts(rows)
        make = lambda row, out: selective_step(u, steps, (b, c), weights, z, row, out)  # noqa: E731
        return compiled(make, u.shape, state)

    def formula(rows, state):
        u, steps, z, b, c = parts(rows)
        y, behind = selective_scan(u, softplus(steps), a, b, c, state)
        return gated_output(y, u, d, z), behind

    check(run, formula, (rows,), (), state)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 129])
@pytest.mark.parametrize(("channels", "taps", "biased", "silu"), [(64, 4, False, True), (48, 3, True, False)])
def test_convolutions(kernels, n, channels, taps, biased, silu):
    """Rows are parts of longer ones."""
    rng = np.random.default_rng(n)
    shapes = (n, channels + 9), (channels, taps), (channels, taps - 1)
    rows, weight, past = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    bias = rng.normal(size=channels).astype(np.float32) if biased else None
    x = rows[:, 5 : 5 + channels]
    y, behind = short_convolution(x, weight, bias, past)
    found = kernels.convolve(x, weight, bias, past, silu=silu)
    close(found, (y / (1 + np.exp(-y)) if silu else y, behind))
    assert np.array_equal(found[1], behind)
    first = kernels.convolve(x[:1], weight, bias, past, silu=silu)
    if n > 1:
        rest = kernels.convolve(x[1:], weight, bias, first[1], silu=silu)
        np.testing.assert_array_equal(np.concatenate((first[0], rest[0])), found[0])


@pytest.mark.parametrize("n", LENGTHS)
def test_convolutions_between_gates(n):
    rng, channels = np.random.default_rng(n), 48
    shapes = (n, 3 * channels), (channels, 3), (channels, 2)
    rows, weight, past = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    def run(rows, past):
        shape = len(rows), channels
        return compiled(lambda row, out: convolve_step(rows, weight, None, row, out, After.GATED), shape, past)

    def formula(rows, past):
        b, c, u = np.split(rows, 3, axis=1)
        y, behind = short_convolution(b * u, weight, None, past)
        return y * c, behind

    check(run, formula, (rows,), (), past)


def test_sizes_that_no_kernel_fits(kernels):
    zeros, numbers = np.zeros((4, 100), np.float32), np.zeros((4, 1), np.float32)
    assert kernels.convolve(zeros, np.zeros((100, 4)), None, np.zeros((100, 3)), silu=True) is None
    assert kernels.delta_rule(zeros, Heads(1, True, 0.0), numbers[..., None], numbers, np.zeros((1, 20, 60))) is None
