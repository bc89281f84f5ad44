"""Launchers of skips.cu: residual connections that are more than a sum. Must not know of layers.

Letters: T rows, S streams, D columns. Arrays are float32, contiguous unless said otherwise.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import Argument, DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch

FILES = ("skips.cu",)

MOST_BANKS = 64
"""Most states that bank_read() adds."""

MOST_COUNT = 8
"""Largest S of the other kinds."""


def _launch(name: str, rows: int, args: tuple[Argument, ...]) -> None:
    launch(build(FILES).get(name), rows, 256, args)


def _gates(raw: DeviceArray) -> tuple[DeviceArray, int]:
    assert raw.strides[1] == 4
    return raw, raw.strides[0] // 4


def fill(x: DeviceArray, streams: DeviceArray, count: int, second: DeviceArray | None = None) -> None:
    """The first `count` vectors of streams (T, N) = x (T, D); the second one `second` (D,), where it is given."""
    rows, columns = (int(n) for n in x.shape)
    assert streams.shape[1] >= count * columns and (second is None or second.size == columns)
    _launch("fill_streams", rows, (x, streams, streams.strides[0] // 4, count, columns, second))


def bank_read(streams: DeviceArray, count: int, score: DeviceArray, epsilon: float, out: DeviceArray) -> None:
    """out (T, D) = the first `count` vectors of streams (T, N) by the softmax of their scores; score (D,)."""
    rows, columns = (int(n) for n in out.shape)
    assert 1 <= count <= MOST_BANKS and streams.shape[1] >= count * columns and score.size == columns
    _launch("bank_read", rows, (streams, streams.strides[0] // 4, count, columns, score, float(epsilon), out))


def bank_write(streams: DeviceArray, part: DeviceArray, bank: int) -> None:
    """The first vector of streams (T, N) += part (T, D); with a bank above 0 it goes there, and becomes part."""
    rows, columns = (int(n) for n in part.shape)
    assert streams.shape[1] >= (bank + 1) * columns
    _launch("bank_write", rows, (streams, streams.strides[0] // 4, columns, part, bank))


def hyper_read(normed: DeviceArray, gates: DeviceArray, out: DeviceArray) -> None:
    """out (T, D) = the mean over streams of normed * sigmoid(gates), both (T, S * D)."""
    rows, columns = (int(n) for n in out.shape)
    count = int(normed.shape[1]) // columns
    assert normed.shape == gates.shape and normed.flags.c_contiguous and gates.flags.c_contiguous
    _launch("hyper_read", rows, (normed, gates, count, columns, 1.0 / count, out))


def gated_read(
    streams: DeviceArray, raw: DeviceArray, factor: DeviceArray, base: DeviceArray, epsilon: float, out: DeviceArray
) -> None:
    """out (T, D) = the sum of streams (T, S * D), each times its gate of raw (T, >= S) plus epsilon."""
    rows, columns = (int(n) for n in out.shape)
    count = int(streams.shape[1]) // columns
    assert count <= MOST_COUNT and streams.flags.c_contiguous
    _launch("gated_read", rows, (streams, count, columns, *_gates(raw), factor, base, float(epsilon), out))


def gated_write(
    streams: DeviceArray,
    raw: DeviceArray,
    first: int,
    factor: DeviceArray | None,
    base: DeviceArray | None,
    magnitude: float,
    epsilon: float,
    part: DeviceArray,
) -> None:
    """Each of streams (T, S * D) += (magnitude * its gate, of raw from `first` on, + epsilon) * part (T, D).

    factor, base: of raw's columns; both None: gates are the sigmoids of raw itself.
    """
    rows, columns = (int(n) for n in part.shape)
    count = int(streams.shape[1]) // columns
    assert count <= MOST_COUNT and streams.flags.c_contiguous and (factor is None) == (base is None)
    small = first, factor, base, float(magnitude), float(epsilon)
    _launch("gated_write", rows, (streams, count, columns, *_gates(raw), *small, part))


def mixed_write(
    streams: DeviceArray,
    raw: DeviceArray,
    factor: DeviceArray,
    base: DeviceArray,
    epsilon: float,
    iterations: int,
    part: DeviceArray,
) -> None:
    """Streams (T, S * D) mix by the matrix that raw (T, 2 * S + S * S) gives, and each takes a share of part (T, D)."""
    rows, columns = (int(n) for n in part.shape)
    count = int(streams.shape[1]) // columns
    assert count <= MOST_COUNT and streams.flags.c_contiguous and iterations >= 1
    small = factor, base, float(epsilon), iterations
    _launch("mixed_write", rows, (streams, count, columns, *_gates(raw), *small, part))


def total(streams: DeviceArray, first: int, count: int, factor: float, out: DeviceArray) -> None:
    """out (T, D) = factor * the sum of `count` vectors of streams (T, N) from `first` on."""
    rows, columns = (int(n) for n in out.shape)
    assert streams.shape[1] >= (first + count) * columns
    _launch("sum_streams", rows, (streams, streams.strides[0] // 4, first, count, columns, float(factor), out))
