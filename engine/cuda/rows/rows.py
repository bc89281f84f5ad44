"""Launchers of rows.cu: the row-wise steps that no product folds in. Letters: T rows, D columns, E experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import Kernel, build
from engine.cuda.driver.launch import launch
from engine.cuda.rows.activation import KernelActivation

FILES = ("activation.cuh", "rows.cu")


def _kernel(name: str) -> Kernel:
    return build(FILES).get(name)


def _flat(name: str, count: int, args: tuple[Argument, ...]) -> None:
    launch(_kernel(name), max(1, min(1024, -(-count // 256))), 256, args)


def normalize(x: DeviceArray, out: DeviceArray, weight: DeviceArray | None, eps: float) -> None:
    """out (T, D) = RMSNorm(x) * weight, or x with weight None; x float32, out float16 or float32 and contiguous."""
    name = "normalize_half" if out.dtype.itemsize == 2 else "normalize_float"
    args = (x, x.strides[0] // 4, out, int(x.shape[1]), weight, float(eps))
    launch(_kernel(name), int(x.shape[0]), 256, args)


@dataclass(frozen=True)
class Limits:
    """What a gated part does beside its activation; see engine.model.config.FfnConfig.

    Attributes:
        limit: of up and of the gate's activation; 0 = none.
        limits_gate: the limit is that of the gate before its activation.
        constants: of XIELU (four) and SITU (two).
    """

    limit: float = 0.0
    limits_gate: bool = False
    constants: tuple[float, ...] = ()


NO_LIMITS = Limits()


def gate(h: DeviceArray, up: DeviceArray | None, activation: KernelActivation, limits: Limits = NO_LIMITS) -> None:
    """h = activation(h) * up in place, without the factor where up is None; both float32, contiguous, the same size.

    SWIGLU_CLAMPED needs up.
    """
    assert up is not None or activation is not KernelActivation.SWIGLU_CLAMPED
    assert h.flags.c_contiguous and (up is None or (up.flags.c_contiguous and up.size == h.size))
    constants = (*limits.constants, 0.0, 0.0, 0.0, 0.0)[:4]
    more = (float(limits.limit), int(limits.limits_gate), *map(float, constants))
    _flat("gate", h.size, (h, up, np.int64(h.size), int(activation), *more))


def add_bias(out: DeviceArray, bias: DeviceArray, alpha: float) -> None:
    """out (T, D) += alpha * bias (D,)."""
    assert out.shape[1] == bias.size
    launch(_kernel("add_bias"), int(out.shape[0]), 256, (out, out.strides[0] // 4, int(bias.size), bias, float(alpha)))


def add_scaled(total: DeviceArray, y: DeviceArray, weight: DeviceArray | None, index: int) -> None:
    """total (T, D) += weight[:, index] * y (T, D); weight float32 (T, E), None = factor 1."""
    assert total.flags.c_contiguous and y.flags.c_contiguous and total.shape == y.shape
    stride = 0 if weight is None else weight.strides[0] // 4
    args = (total, y, int(y.shape[1]), weight, stride, index)
    launch(_kernel("add_scaled"), int(y.shape[0]), 256, args)


def add_gated(total: DeviceArray, y: DeviceArray, score: DeviceArray) -> None:
    """total (T, D) += sigmoid(score) * y (T, D); score float32 (T, >= 1), of which the first column counts."""
    assert total.flags.c_contiguous and y.flags.c_contiguous and total.shape == y.shape
    launch(_kernel("add_gated"), int(y.shape[0]), 256, (total, y, int(y.shape[1]), score, score.strides[0] // 4))


def copy(source: DeviceArray, target: DeviceArray) -> None:
    """target = source, both float32 and contiguous."""
    assert source.flags.c_contiguous and target.flags.c_contiguous and source.size == target.size
    _flat("copy_rows", source.size, (source, target, np.int64(source.size)))


def read_bandwidth(stream: Stream, n_bytes: int = 1 << 30) -> float:
    """Bytes per second that this GPU reads from its memory: the best of several sums over more than its cache holds."""
    import cupy

    free = int(cupy.cuda.runtime.memGetInfo()[0])
    data = _noise(min(n_bytes, free // 4) // 16 * 4, stream)
    out = cupy.zeros(1, cupy.float32)
    blocks = 8 * int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    best = 0.0
    passes = 8  # several launches per measurement: the time from the first event to the first launch is the host's
    for _ in range(5):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(passes):
            launch(_kernel("read_all"), blocks, 512, (data, np.int64(data.nbytes // 16), out), stream=stream, pdl=False)
        end.record(stream)
        end.synchronize()
        best = max(best, passes * data.nbytes / (cupy.cuda.get_elapsed_time(begin, end) * 1e-3))
    return best


def _noise(words: int, stream: Stream) -> DeviceArray:
    """uint32 (words,), not zeros: memory of zeros can read faster than real data."""
    import cupy

    data: DeviceArray = cupy.empty(words, cupy.uint32)
    filled = min(words, 1 << 20)
    data[:filled].set(np.random.default_rng(0).integers(0, 1 << 32, filled, np.uint32), stream=stream)
    while filled < words:
        n = min(filled, words - filled)
        copy, first = cupy.cuda.runtime.memcpyAsync, int(data.data.ptr)
        copy(first + 4 * filled, first, 4 * n, cupy.cuda.runtime.memcpyDeviceToDevice, stream.ptr)
        filled += n
    return data
