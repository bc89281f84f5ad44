"""What CuPy raises, as the error that callers know. Must not know what was being done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import DeviceError


@contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """Turns what CuPy raises into DeviceError."""
    import cupy

    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise DeviceError(f"the GPU ran out of memory while {doing}: {error}") from error
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        raise DeviceError(f"the GPU failed while {doing}: {error}") from error
