"""What CUDA raises reaches callers as a DeviceError that says what to do; a GPU that is full leaves "auto" the CPU."""

import os

import pytest

from engine import LLM, SamplingParams
from engine.cuda import availability
from engine.cuda.driver.failure import CudaStatus, device_errors, is_out_of_memory
from engine.errors import DeviceError
from engine.runner import devices
from tests.support.gpu.fake_cupy import FakeGpu, failing, install
from tests.support.models.gguf_builder import tiny_llama

FULL = "cudaErrorMemoryAllocation: out of memory"
FORKED = "cudaErrorInitializationError: initialization error"
ILLEGAL = "cudaErrorIllegalAddress: an illegal memory access was encountered"


def raised_by(package, name, text, base=RuntimeError):
    """An error of a class as that package defines it."""
    return type(name, (base,), {"__module__": package})(text)


ERRORS = {
    "runtime": (raised_by("cupy_backends.cuda.api.runtime", "CUDARuntimeError", FULL), True),
    "driver": (raised_by("cupy_backends.cuda.api.driver", "CUDADriverError", "CUDA_ERROR_OUT_OF_MEMORY: no"), True),
    "pool": (raised_by("cupy.cuda.memory", "OutOfMemoryError", "Out of memory allocating 9 bytes", MemoryError), True),
    "host": (MemoryError("unable to allocate 9 GiB"), True),
    "cublas": (raised_by("cupy_backends.cuda.libs.cublas", "CUBLASError", "CUBLAS_STATUS_ALLOC_FAILED"), True),
    "nvrtc": (raised_by("cupy_backends.cuda.libs.nvrtc", "NVRTCError", "NVRTC_ERROR_OUT_OF_MEMORY (1)"), True),
    "bindings": (CudaStatus("CUDA_ERROR_OUT_OF_MEMORY"), True),
    "illegal address": (raised_by("cupy_backends.cuda.api.runtime", "CUDARuntimeError", ILLEGAL), False),
    "launch": (CudaStatus("CUDA_ERROR_LAUNCH_FAILED"), False),
    "execution": (raised_by("cupy_backends.cuda.libs.cublas", "CUBLASError", "CUBLAS_STATUS_EXECUTION_FAILED"), False),
    "a later class": (raised_by("cuda.bindings.newer", "SomeError", "CUDA_ERROR_ILLEGAL_ADDRESS"), False),
    "library": (ImportError('Failure finding "libcublasLt.so.13"'), False),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_every_package_become_device_errors(name):
    error, no_memory = ERRORS[name]
    with pytest.raises(DeviceError, match="while measuring") as told, device_errors("measuring"):
        raise error
    assert str(error) in str(told.value)
    assert told.value.__cause__ is error
    assert is_out_of_memory(told.value) == no_memory
    if no_memory:
        assert "ran out of memory" in str(told.value)
    advice = "use device='cpu'" if no_memory else "pip install" if name == "library" else "restart the program"
    assert advice in str(told.value)


def test_other_errors_stay_as_they_are():
    for error in (AssertionError("ours"), DeviceError("told"), ValueError("other"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as told, device_errors("measuring"):
            raise error
        assert told.value is error


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "tiny.gguf"
    tiny_llama(path, width=256, ffn=512)
    return path


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended card in a machine that shows a trace of one."""
    gpu = install(monkeypatch, FakeGpu())
    monkeypatch.setattr(devices, "_GPU_TRACES", (str(tmp_path),))
    return gpu


@pytest.mark.parametrize(
    ("call", "advice"), [("device", "end other programs"), ("count", "end other programs"), ("malloc", "end")]
)
def test_a_full_card_is_the_cpu_for_auto_and_an_error_for_cuda(path, gpu, caplog, call, advice):
    """The first call that needs memory may be the one that looks at the card, or any later one."""
    with failing(gpu, call, FULL):
        with pytest.raises(DeviceError, match=f"out of memory.*{advice}"):
            LLM(path, device="cuda", context_length=64)
        with LLM(path, device="auto", context_length=64, threads=1) as llm:
            assert llm.device == "cpu"
            assert llm.generate([1, 2], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("running on the CPU: ")
    assert "out of memory" in warning


@pytest.mark.parametrize("call", ["count", "device"])
def test_the_child_of_a_fork_is_told_to_spawn(gpu, call):
    with failing(gpu, call, FORKED):
        assert "'spawn'" in availability()


def test_too_little_room_is_the_cpu_for_auto(path, gpu, caplog):
    gpu.memory = 300 << 20
    with LLM(path, device="auto", context_length=64, threads=1) as llm:
        assert llm.device == "cpu"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "300" in warning or "0.29 GiB are free" in warning


def test_what_a_failed_opening_took_is_given_back(path, gpu):
    """An error in the last call of opening, and an interrupt there."""
    import cupy

    for fault in ("synchronize", "launch"):
        pools, make = [], cupy.cuda.MemoryPool
        cupy.cuda.MemoryPool = lambda pools=pools, make=make: pools.append(make()) or pools[-1]
        with failing(gpu, fault, FULL), pytest.raises(DeviceError, match="while opening the model"):
            LLM(path, device="cuda", context_length=64)
        cupy.cuda.MemoryPool = make
        assert [pool.freed for pool in pools] == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_model_of_the_parent_is_no_model_of_the_child(path, gpu):
    with LLM(path, device="cuda", context_length=64) as llm:
        child = os.fork()
        if child == 0:
            text = ""
            try:
                with failing(gpu, "device", FORKED), failing(gpu, "synchronize", FORKED), failing(gpu, "free", FORKED):
                    try:
                        llm.generate([1, 2], SamplingParams(max_tokens=1))
                    except DeviceError as error:
                        text = str(error)
                    llm.close()
            finally:
                os._exit(0 if "forked from one that had opened a model" in text else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert llm.generate([1, 2], SamplingParams(max_tokens=1, ignore_eos=True)).token_ids
