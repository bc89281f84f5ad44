"""Launches kernels, also with programmatic dependent launch, eagerly or into a stream under capture.

CuPy's own launch knows no launch attributes; cuda-bindings' cuLaunchKernelEx does. Where that package is missing the
kernels still run, one strictly after the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from engine.cuda.module import Kernel
from engine.errors import DeviceError


@cache
def _bindings() -> Any | None:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


_SCALARS: dict[type, Any] = {
    bool: ctypes.c_int,
    int: ctypes.c_int,
    float: ctypes.c_float,
    np.int32: ctypes.c_int,
    np.uint32: ctypes.c_uint,
    np.int64: ctypes.c_longlong,
    np.uint64: ctypes.c_ulonglong,
    np.float32: ctypes.c_float,
}


def pack(args: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Kernel arguments as (values, ctypes types): arrays become pointers, None null, int 32 bits wide, float single."""
    values: list[Any] = []
    types: list[Any] = []
    for arg in args:
        pointer = getattr(arg, "data", None)
        if arg is None:
            values.append(0)
            types.append(ctypes.c_void_p)
        elif pointer is not None and hasattr(pointer, "ptr"):
            values.append(pointer.ptr)
            types.append(ctypes.c_void_p)
        elif type(arg) in _SCALARS:
            values.append(arg if isinstance(arg, (int, float)) else arg.item())
            types.append(_SCALARS[type(arg)])
        elif isinstance(arg, ctypes.c_void_p):
            values.append(arg.value or 0)
            types.append(ctypes.c_void_p)
        elif isinstance(arg, ctypes._SimpleCData):
            values.append(arg.value)
            types.append(type(arg))
        else:
            raise TypeError(f"no kernel argument can be made of {type(arg).__name__}")
    return tuple(values), tuple(types)


def launch(
    kernel: Kernel,
    grid: tuple[int, ...] | int,
    block: tuple[int, ...] | int,
    args: Sequence[Any],
    *,
    shared: int = 0,
    stream: Any = None,
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
    values, types = pack(args)
    driver = _bindings()
    if driver is None:
        boxed = tuple(kind(value) for kind, value in zip(types, values, strict=True))
        holder = [np.frombuffer(bytes(box), dtype=np.uint8) for box in boxed]
        kernel.function(grid3, block3, tuple(holder), shared, stream=stream)
        return
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid3
    config.blockDimX, config.blockDimY, config.blockDimZ = block3
    config.sharedMemBytes = shared
    config.hStream = stream.ptr
    if pdl:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
        config.numAttrs = 1
    (status,) = driver.cuLaunchKernelEx(config, kernel.ptr, (values, types), 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(
            f"the GPU refused kernel {kernel.name} (grid {grid3}, block {block3}, {shared} bytes shared): {status.name}"
        )
