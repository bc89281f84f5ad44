"""Small things on their way to the device: collected by the host, put in their places by one kernel in stream order.

The kernel reads pinned host memory itself, so that a step's news (tokens, positions, pages, settings of new sequences)
cost one launch and no copy of their own, and neither side waits. Must not know what the arrays mean.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import Kernel, build
from engine.cuda.driver.launch import launch

FILES = ("moves.cu",)
RECORD = np.dtype([("to", "<u8"), ("first", "<u4"), ("count", "<u4")])
_PACKED = struct.Struct("<QII")  # the same
PIECE = 1024
"""Words one block moves; longer arrays take several."""

_RECORDS = 1024
_WORDS = 1 << 16
_BUFFERS = 4
_VIEWS = 512
"""Sets of arrays in the arena that are kept: making an array costs the host some microseconds."""
_FILLING = [bytes(-n % 16) for n in range(16)]


def kernel(name: str) -> Kernel:
    """A kernel of moves.cu."""
    return build(FILES).get(name)


class Mapped:
    """A pinned host array that kernels reach: `host` is numpy, `device` the same memory as a CuPy array."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, *, clear: bool = True) -> None:
        import cupy

        count = int(np.prod(shape))
        n_bytes = count * np.dtype(dtype).itemsize
        self._memory = cupy.cuda.alloc_pinned_memory(n_bytes)
        self.host = np.frombuffer(self._memory, dtype, count).reshape(shape)
        if clear:
            self.host[:] = 0
        outside = cupy.cuda.UnownedMemory(self._memory.ptr, n_bytes, self._memory)
        self.device = cupy.ndarray(shape, np.dtype(dtype), cupy.cuda.MemoryPointer(outside, 0))


class _Buffer:
    """Records and data of one send.

    Attributes:
        used: a kernel that reads it may have been launched.
        recorded: the event comes after that kernel; not where the launching call was cut short in between.
    """

    def __init__(self) -> None:
        import cupy

        self.records = Mapped((_RECORDS * RECORD.itemsize // 4,), np.uint32)
        self.data = Mapped((_WORDS,), np.uint32)
        # The same as bytes: writing them through numpy takes several times as long.
        self.packed, self.words = self.records.host.data.cast("B"), self.data.host.data.cast("B")
        self.event = cupy.cuda.Event(disable_timing=True)
        self.used = self.recorded = False


class Staging:
    """Collects writes to device arrays; send() makes them happen.

    Writes to the same place must be in different sends: within one there is no order. A call that is cut short leaves
    what it collected; the next call drops it before anything else, or its send would mix it with its own.

    Args:
        stream: the stream that everything is ordered on.
        arena_words: 32-bit words of device memory for place().
    """

    def __init__(self, stream: Stream, arena_words: int) -> None:
        import cupy

        self._stream = stream
        self._scatter = kernel("scatter")
        self._buffers = [_Buffer() for _ in range(_BUFFERS)]
        self._next = 0
        self._arena: DeviceArray = cupy.empty(max(arena_words, 1), np.uint32)
        self._arena_pointer = int(self._arena.data.ptr)
        self._views: dict[tuple[Any, ...], Sequence[DeviceArray]] = {}
        self._arena_at = 0
        self._n_records = self._words = 0

    def put(self, array: DeviceArray, at: int, values: npt.NDArray[Any]) -> None:
        """Writes values (4- or 8-byte elements) into a contiguous device array from its element `at` on."""
        assert values.dtype.itemsize % 4 == 0
        begin = at * int(array.itemsize)
        assert begin + values.nbytes <= array.nbytes, "a write beyond the end of its array"
        self._collect(int(array.data.ptr) + begin, values.tobytes())

    def place(self, values: npt.NDArray[Any]) -> DeviceArray:
        """Gives an array on the device that holds the values after the next send(), until the arena is used anew."""
        return self.place_all([values])[0]

    def place_all(self, arrays: Sequence[npt.NDArray[Any]]) -> Sequence[DeviceArray]:
        """place() of several arrays in one write: a prompt waits for what this costs the host."""
        at, key = self._arena_at, (self._arena_at, *[(values.dtype.char, values.shape) for values in arrays])
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._view(arrays)
        data = b"".join([part for values in arrays for part in (values.tobytes(), _FILLING[values.nbytes % 16])])
        assert 4 * at + len(data) <= self._arena.nbytes, "the arena of a batch is too small"
        self._arena_at = at + len(data) // 4
        self._collect(self._arena_pointer + 4 * at, data)
        return views

    def _view(self, arrays: Sequence[npt.NDArray[Any]]) -> Sequence[DeviceArray]:
        """Arrays of these shapes, one behind the other in the arena, each from a multiple of 16 bytes on."""
        if len(self._views) >= _VIEWS:
            self._views.clear()
        at, views = self._arena_at, []
        for values in arrays:
            n = values.nbytes // 4
            assert at + n <= self._arena.size, "the arena of a batch is too small"
            views.append(self._arena[at : at + n].view(values.dtype).reshape(values.shape))
            at += n + 3 & ~3
        return views

    def _collect(self, pointer: int, data: bytes) -> None:
        """Bytes, whole words, on their way to an address."""
        for first in range(0, len(data), 4 * PIECE):
            piece = data if len(data) <= 4 * PIECE else data[first : first + 4 * PIECE]
            n = len(piece) // 4
            if self._n_records == _RECORDS or self._words + n > _WORDS:
                self.send()
            if not self._n_records:
                self._claim()
            buffer, at = self._buffers[self._next], self._words
            buffer.words[4 * at : 4 * (at + n)] = piece
            _PACKED.pack_into(buffer.packed, self._n_records * _PACKED.size, pointer + first, at, n)
            self._n_records += 1  # behind both: cut short before, there is nothing of it
            self._words = at + n

    def rewind(self) -> None:
        """The arena may be used anew; safe at once, because whatever reads it was launched before."""
        self._arena_at = 0

    def send(self) -> None:
        """Launches the copies; later launches of the stream see them."""
        if not self._n_records:
            return
        n, buffer = self._n_records, self._buffers[self._next]
        self._n_records = self._words = 0
        args = (buffer.records.device, buffer.data.device)
        buffer.used, buffer.recorded = True, False
        self._next = (self._next + 1) % _BUFFERS  # before the launch: cut short behind it, nothing writes here again
        launch(self._scatter, n, 256, args, stream=self._stream, pdl=False)
        buffer.event.record(self._stream)
        buffer.recorded = True

    def drop(self) -> None:
        """Forgets what was put and not sent."""
        self._n_records = self._words = 0

    def _claim(self) -> None:
        """Waits until the device is done with the buffer that is filled next; it nearly always is."""
        buffer = self._buffers[self._next]
        if buffer.recorded:
            buffer.event.synchronize()
        elif buffer.used:
            self._stream.synchronize()


def gather_rows(x: DeviceArray, index: DeviceArray, out: DeviceArray) -> None:
    """out (R, D) = x[index] for float32 rows (T, D) and int32 index (R,); both contiguous."""
    assert x.shape[1] == out.shape[1]
    launch(kernel("gather_rows"), int(index.size), 256, (x, index, out, int(x.shape[1])), pdl=False)


def addresses(arrays: Sequence[DeviceArray]) -> npt.NDArray[np.uint64]:
    """Device addresses of arrays."""
    return np.array([array.data.ptr for array in arrays], np.uint64)
