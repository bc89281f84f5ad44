"""The GPU backend. Importing this package imports neither cupy nor any kernel; see availability()."""

from __future__ import annotations

import importlib.util

from engine.cuda.driver.failure import describe, device_errors, is_cuda_error, is_out_of_memory


def availability(device_index: int = 0) -> str | None:
    """None where the GPU can be used, else one sentence saying what is missing and what to install."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'gguf-engine[cuda]'"
    try:
        import cupy
        from cupy_backends.cuda.libs import nvrtc
    except Exception as error:
        return f"CuPy cannot be loaded ({error}): reinstall it with pip install 'gguf-engine[cuda]'"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if is_out_of_memory(error) or "InitializationError" in str(error):  # the latter in the child of a fork
            return f"the GPUs give no access ({describe(error)})"
        return f"no usable NVIDIA driver or GPU ({error}): install the NVIDIA driver for CUDA 13 (580 or newer)"
    if device_index >= count:
        return f"there is no GPU {device_index}: {count} found (cuda:0 to cuda:{count - 1})"
    try:
        capability = int(cupy.cuda.Device(device_index).compute_capability)
    except Exception as error:  # the first call that needs memory of the GPU
        if not is_cuda_error(error):
            raise
        return f"GPU {device_index} gives no access ({describe(error)})"
    if capability < 75:
        return f"GPU {device_index} has compute capability {capability // 10}.{capability % 10}; 7.5 or newer is needed"
    try:
        nvrtc.getVersion()
    except Exception as error:
        return f"the CUDA compiler library NVRTC cannot be loaded ({error}): pip install 'gguf-engine[cuda]'"
    return None


def free_memory(device_index: int = 0) -> int:
    """Bytes of a usable GPU that no process has taken.

    Raises:
        DeviceError: the GPU failed.
    """
    import cupy

    with device_errors("asking for its free memory"), cupy.cuda.Device(device_index):
        return int(cupy.cuda.runtime.memGetInfo()[0])


def total_memory(device_index: int = 0) -> int:
    """Bytes of memory that a GPU has; needs one that availability() allows."""
    import cupy

    with cupy.cuda.Device(device_index):
        return int(cupy.cuda.runtime.memGetInfo()[1])
