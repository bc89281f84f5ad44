"""Launchers of streams.cu: a residual stream of several vectors of a token (AltUp). Must not know of layers.

Letters: T rows, A streams, D columns. Arrays are float32 and contiguous unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import Argument, DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch

FILES = ("streams.cu",)

MOST_STREAMS = 8
"""Largest A."""


@dataclass(frozen=True, eq=False)
class DeviceStreams:
    """What a layer does with the streams; see engine.model.config.AltUpConfig.

    Attributes:
        count: A. active: the stream that passes through the layer.
        router: (A, D), times the weight of its norm and 1 / D. epsilon: of that norm.
        predict: (A * A, A). correct: (A, A). scale: (D,).
    """

    count: int
    active: int
    router: DeviceArray
    epsilon: float
    predict: DeviceArray
    correct: DeviceArray
    scale: DeviceArray


def _launch(name: str, rows: int, args: tuple[Argument, ...]) -> None:
    launch(build(FILES).get(name), rows, 256, args)


def predict(weights: DeviceStreams, streams: DeviceArray, predicted: DeviceArray, out: DeviceArray) -> None:
    """predicted (T, A * D) = step 1 of streams (T, A * D), which are apart from it; out (T, D) = its active one."""
    rows, columns = (int(n) for n in out.shape)
    assert streams.shape == predicted.shape == (rows, weights.count * columns)
    shape = weights.count, weights.active, columns
    args = (streams, *shape, weights.router, float(weights.epsilon), weights.predict, predicted, out)
    _launch("altup_predict", rows, args)


def correct(weights: DeviceStreams, predicted: DeviceArray, made: DeviceArray, streams: DeviceArray) -> None:
    """streams (T, A * D) = step 3 of predicted and of made (T, D), which becomes what step 4 reads."""
    rows, columns = (int(n) for n in made.shape)
    assert streams.shape == predicted.shape == (rows, weights.count * columns)
    shape = weights.count, weights.active, columns
    args = (predicted, *shape, weights.router, float(weights.epsilon), weights.correct, weights.scale, made, streams)
    _launch("altup_correct", rows, args)


def add(streams: DeviceArray, y: DeviceArray) -> None:
    """All of streams (T, A * D) but the first += y (T, D)."""
    rows, columns = (int(n) for n in y.shape)
    assert streams.shape[0] == rows and streams.shape[1] % columns == 0
    _launch("altup_add", rows, (streams, int(streams.shape[1]) // columns, columns, y))


def lengthen(y: DeviceArray, target: DeviceArray, out: DeviceArray, *, add: bool = False) -> None:
    """out (T, D) = or += y (T, D), row by row at the Euclidean length of target (T, D); only y is contiguous."""
    assert y.shape == target.shape == out.shape and y.flags.c_contiguous
    strides = target.strides[0] // 4, out.strides[0] // 4
    rows, columns = (int(n) for n in y.shape)
    _launch("altup_lengthen", rows, (y, target, strides[0], columns, out, strides[1], int(add)))
