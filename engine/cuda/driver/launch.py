"""Launches kernels, also with programmatic dependent launch, eagerly or into a stream under capture.

CuPy's own launch knows no launch attributes; cuda-bindings' cuLaunchKernelEx does. Where that package is missing the
kernels still run, one strictly after the other. A prompt is hundreds of launches, each of which the host must have made
before the device gets there: what can be made once is kept.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from engine.cuda.driver.arrays import Argument, Stream
from engine.cuda.driver.compiler import Kernel
from engine.cuda.driver.failure import CudaStatus, device_error

MAX_ARGS = 48
_CELL = 8


@cache
def _bindings() -> Any | None:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


_SCALARS: dict[type, str] = {
    bool: "i4x",
    int: "i4x",
    float: "f4x",
    np.int32: "i4x",
    np.uint32: "I4x",
    np.int64: "q",
    np.uint64: "Q",
    np.float32: "f4x",
    ctypes.c_int: "i4x",
    ctypes.c_short: "h6x",
    ctypes.c_longlong: "q",
}
_layouts: dict[tuple[type, ...], tuple[struct.Struct, tuple[int, ...], tuple[int, ...]]] = {}


def pack(args: Sequence[Any]) -> tuple[struct.Struct, list[Any]]:
    """Kernel arguments as a layout of cells of eight bytes, and the values in them.

    Arrays become pointers, None null, int 32 bits wide, float single.

    Raises:
        TypeError: something that no kernel takes.
    """
    kinds = tuple(map(type, args))
    found = _layouts.get(kinds)
    if found is None:
        found = _layouts[kinds] = _layout(args)
    layout, arrays, boxed = found
    values = list(args)
    for i in arrays:
        values[i] = 0 if args[i] is None else args[i].data.ptr
    for i in boxed:
        values[i] = args[i].value or 0
    return layout, values


def _layout(args: Sequence[Any]) -> tuple[struct.Struct, tuple[int, ...], tuple[int, ...]]:
    """The layout of arguments of these types; which of them are pointers to arrays, which hold a value of ctypes."""
    codes: list[str] = []
    arrays: list[int] = []
    boxed: list[int] = []
    for i, arg in enumerate(args):
        code = _SCALARS.get(type(arg))
        if arg is None or hasattr(getattr(arg, "data", None), "ptr"):
            arrays.append(i)
            code = "Q"
        elif isinstance(arg, (ctypes._SimpleCData)):
            boxed.append(i)
            code = "Q" if isinstance(arg, ctypes.c_void_p) else code
        if code is None:
            raise TypeError(f"no kernel argument can be made of {type(arg).__name__}")
        codes.append(code)
    return struct.Struct("<" + "".join(codes)), tuple(arrays), tuple(boxed)


class _Calls(threading.local):
    """A thread's cells for arguments, their addresses, and a launch configuration of either kind."""

    def __init__(self) -> None:
        self.cells = (ctypes.c_ubyte * (MAX_ARGS * _CELL))()
        first = ctypes.addressof(self.cells)
        self.pointers = (ctypes.c_void_p * MAX_ARGS)(*range(first, first + MAX_ARGS * _CELL, _CELL))
        self.address = ctypes.addressof(self.pointers)
        self.configs = {pdl: self._config(pdl) for pdl in (False, True)}

    @staticmethod
    def _config(pdl: bool) -> Any:
        driver = _bindings()
        if driver is None:
            return None
        config = driver.CUlaunchConfig()
        if pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config


_calls = _Calls()


def launch(
    kernel: Kernel,
    grid: tuple[int, ...] | int,
    block: tuple[int, ...] | int,
    args: Sequence[Argument],
    *,
    shared: int = 0,
    stream: Stream | None = None,
    pdl: bool = True,
) -> None:
    """Launches a kernel.

    Args:
        kernel: from Module.get.
        grid: blocks, one to three numbers.
        block: threads of a block, one to three numbers.
        args: arrays (passed as pointers), None (null), int (32 bit), float (single), numpy scalars or ctypes values.
        shared: bytes of dynamic shared memory; the kernel's limit is raised as needed.
        stream: a CuPy stream; the current one when left out. It may be under capture.
        pdl: start as soon as the previous kernel of the stream allows it. Only for kernels that call pdl_wait().

    Raises:
        DeviceError: the driver refused the launch.
    """
    grid3 = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
    block3 = (block, 1, 1) if isinstance(block, int) else (*block, 1, 1)[:3]
    if shared:
        kernel.allow_shared(shared)
    if stream is None:
        import cupy

        stream = cupy.cuda.get_current_stream()
    assert len(args) <= MAX_ARGS
    layout, values = pack(args)
    driver = _bindings()
    if driver is None:
        cells = np.frombuffer(layout.pack(*values).ljust(len(args) * _CELL, b"\0"), np.uint64)
        kernel.function(grid3, block3, tuple(cells[i : i + 1] for i in range(len(args))), shared, stream=stream)
        return
    calls = _calls
    layout.pack_into(calls.cells, 0, *values)
    config = calls.configs[pdl]
    config.gridDimX, config.gridDimY, config.gridDimZ = grid3
    config.blockDimX, config.blockDimY, config.blockDimZ = block3
    config.sharedMemBytes = shared
    config.hStream = stream.ptr
    (status,) = driver.cuLaunchKernelEx(config, kernel.ptr, calls.address, 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        tried = f"launching kernel {kernel.name} (grid {grid3}, block {block3}, {shared} bytes shared)"
        cause = CudaStatus(str(status.name))
        raise device_error(tried, cause) from cause
