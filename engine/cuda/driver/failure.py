"""What CUDA and its Python packages raise, as the error that callers know. Must not know what was being done.

The errors of all these packages end here (CuPy's of the runtime, the driver, its memory pool and the libraries;
NVRTC's; statuses of cuda-bindings), by the package that their class belongs to: a class that a later version adds is
translated as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import DeviceError

_PACKAGES = ("cupy", "cupyx", "cupy_backends", "cuda")

_NO_MEMORY = ("MemoryAllocation", "OUT_OF_MEMORY", "ALLOC_FAILED", "out of memory")
"""In the text of an error of any of these packages: memory was refused, and the GPU is as it was before."""

_ADVICE = {
    _NO_MEMORY: "end other programs that use it (nvidia-smi shows them), open the model with a smaller context_length, "
    "cache_tokens or max_sequences, or use device='cpu'",
    ("InitializationError", "NOT_INITIALIZED"): "CUDA does not work in the child of a fork: "
    "start processes by the method 'spawn'; if nothing was forked, restart the program",
    ("NoDevice", "InsufficientDriver", "NO_DEVICE"): "install the NVIDIA driver for CUDA 13 (580 or newer)",
    ("DevicesUnavailable", "DEVICE_UNAVAILABLE"): "another program has the GPU for itself: end it",
    ("NoKernelImageForDevice", "NO_BINARY_FOR_GPU", "InvalidPtx", "UnsupportedPtx", "INVALID_IMAGE"): "update the "
    "NVIDIA driver, or the packages with pip install -U 'gguf-engine[cuda]'",
    ("libcu", "libnv", "cublas", "nvrtc"): "a CUDA library is missing: pip install 'gguf-engine[cuda]'",
}
_OTHERWISE = "restart the program and open the model again; if it happens again, try device='cpu' and report it"


class CudaStatus(RuntimeError):
    """A status of cuda-bindings that is no success, by its name."""


def is_cuda_error(error: BaseException | None) -> bool:
    """Whether CUDA or one of its packages raised it, or memory was refused."""
    if isinstance(error, (MemoryError, ImportError, CudaStatus)):
        return True
    return any(kind.__module__.split(".")[0] in _PACKAGES for kind in type(error).__mro__)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was refused, of the GPU or of the host; the GPU works on."""
    if isinstance(error, DeviceError):
        return is_out_of_memory(error.__cause__)
    if isinstance(error, MemoryError):
        return True
    return is_cuda_error(error) and any(part in str(error) for part in _NO_MEMORY)


def describe(error: BaseException) -> str:
    """What happened and what to do about it, for people."""
    text = str(error) or type(error).__name__
    advice = next((advice for parts, advice in _ADVICE.items() if any(part in text for part in parts)), _OTHERWISE)
    return f"{text}: {_ADVICE[_NO_MEMORY] if is_out_of_memory(error) else advice}"


def device_error(doing: str, error: BaseException) -> DeviceError:
    """The DeviceError to raise from an error of CUDA."""
    who = "GPU" if type(error) is not MemoryError and is_cuda_error(error) else "host"
    happened = "ran out of memory" if is_out_of_memory(error) else "failed"
    return DeviceError(f"the {who} {happened} while {doing}: {describe(error)}")


@contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """Turns what CUDA raises into DeviceError, with the original as its cause."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        if not is_cuda_error(error):
            raise
        raise device_error(doing, error) from error
