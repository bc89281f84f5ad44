"""Launchers of token_shift.cu: RWKV's inputs that are mixed with those of the token before.

Letters: T rows, D columns, C mixed inputs, Z rows of states. Arrays are float32 CuPy arrays. Must not know of layers.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.plan import Job
from engine.cuda.recurrent.rows import DecodeRows, Rows

_FILES = ("recurrent.cuh", "token_shift.cu")

THREADS = 256
"""Of a block, and columns that it takes."""


def shift_job() -> Job:
    """What builds the kernels."""
    return _FILES, {}


def shift(
    rows: Rows,
    x: DeviceArray,
    lerps: DeviceArray,
    state: DeviceArray,
    out: DeviceArray,
    *,
    change: DeviceArray | None = None,
    stream: Stream | None = None,
) -> None:
    """out[:, c] = x + (x' - x) * lerps[c], with x' of the token before; keeps each sequence's last x.

    Args:
        rows: of the step; rows that it does not name, or with position -1, stay as they are.
        x: (T, D), contiguous rows.
        lerps: (C, D), contiguous.
        state: (Z, D), contiguous, the last x.
        out: (T, C * D), contiguous rows.
        change: (T, D) with the row stride of out, x' - x is written there; None: it is not wanted.
        stream: the current stream when left out.
    """
    count, columns = lerps.shape
    assert x.shape[1] == state.shape[1] == columns and out.shape[1] == count * columns
    assert lerps.flags.c_contiguous and state.flags.c_contiguous and x.strides[1] == out.strides[1] == 4
    assert change is None or (change.shape[1] == columns and change.strides == out.strides)
    before = (x, x.strides[0] // 4, lerps, int(count), state)
    after: tuple[Argument, ...] = (out, out.strides[0] // 4, change, int(columns))
    blocks, module = -(-columns // THREADS), build(_FILES, defines={})
    if isinstance(rows, DecodeRows):
        assert min(len(x), len(out)) >= rows.count and rows.fit(state)
        args: tuple[Argument, ...] = (*before, rows.places, rows.positions, rows.offsets, *after)
        launch(module.get("shift_decode"), (blocks, rows.count), THREADS, args, stream=stream)
    elif len(rows.tiles):
        args = (*before, rows.spans, rows.tiles, *after)
        launch(module.get("shift_prompt"), (blocks, len(rows.tiles)), THREADS, args, stream=stream)


def shift_further(
    x: DeviceArray, change: DeviceArray, lerps: DeviceArray, out: DeviceArray, *, stream: Stream | None = None
) -> None:
    """out[:, c] = x + change * (lerps[c] + out[:, c]) in place.

    Args:
        x: (T, D), contiguous rows. change: (T, D) with the row stride of out.
        change: what shift() gave.
        lerps: (C, D), contiguous.
        out: (T, C * D), contiguous rows.
        stream: the current stream when left out.
    """
    count, columns = lerps.shape
    assert x.shape == change.shape and out.shape == (len(x), count * columns) and change.strides == out.strides
    assert lerps.flags.c_contiguous and x.strides[1] == out.strides[1] == 4
    args = (x, x.strides[0] // 4, change, lerps, int(count), out, out.strides[0] // 4, int(columns))
    kernel = build(_FILES, defines={}).get("shift_further")
    launch(kernel, (-(-columns // THREADS), len(x)), THREADS, args, stream=stream)


def squash(x: DeviceArray, tanhs: int, *, stream: Stream | None = None) -> None:
    """The first columns of x (T, N) become their tanh, the others their sigmoid, in place; rows contiguous."""
    assert 0 <= tanhs <= x.shape[1] and x.strides[1] == 4
    args = (x, x.strides[0] // 4, tanhs, int(x.shape[1]) - tanhs)
    launch(build(_FILES, defines={}).get("squash"), len(x), THREADS, args, stream=stream)
