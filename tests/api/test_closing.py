"""close() cut short at any line and called again: everything is freed, on the CPU and on a pretended GPU."""

import gc
import signal
import weakref
from contextlib import suppress

import pytest

from engine import LLM, SamplingParams
from engine.errors import DeviceError, EngineError
from tests.support.gpu.fake_cupy import FakeGpu, failing, install
from tests.support.injection import Injected, Injection, engine_files
from tests.support.models.gguf_builder import tiny_llama

PARAMS = SamplingParams(max_tokens=3, temperature=0)
SHARED = engine_files("api/llm.py", "gguf/reader.py", "scheduling/loop.py")
LOOP = engine_files("scheduling/loop.py")
CPU = SHARED | engine_files("cpu/runner.py", "cpu/backend.py", "cpu/threads.py", "cpu/caches/model.py")
GPU = SHARED | engine_files(
    "cuda/runner.py", "cuda/driver/context.py", "cuda/driver/failure.py", "cuda/step/machine.py"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("closing") / "tiny.gguf"
    tiny_llama(path, width=64, ffn=128)
    return path


@pytest.fixture
def gpu(monkeypatch):
    gpu = install(monkeypatch, FakeGpu())
    monkeypatch.setattr("engine.cuda.runner.availability", lambda index=0: None)
    monkeypatch.setattr("engine.cuda.availability", lambda index=0: None)
    return gpu


class Signal(Injection):
    """Sends SIGINT instead, as Ctrl-C does: the loop may put it off."""

    def __call__(self, frame, event, argument):
        try:
            return super().__call__(frame, event, argument)
        except Injected:
            signal.raise_signal(signal.SIGINT)
            return self


def close_in_two(llm, files, at, kind=Injected):
    """close() with an exception at event number `at`, then again; returns how many events there were."""
    llm.stream([1, 2, 3], PARAMS)  # a request that has not begun
    make = Signal if kind is Signal else Injection
    injection = make(at, files, Injected if kind is Signal else kind, events=("line",))
    with suppress(KeyboardInterrupt):
        injection.during(llm.close)
    llm.close()
    assert llm._file._parts == []
    with pytest.raises(EngineError, match="the model is closed"):
        llm.generate([1, 2], PARAMS)
    llm.close()
    return injection.seen


def on_the_cpu(path, at, kind=Injected, files=CPU):
    llm = LLM(path, device="cpu", threads=2, context_length=64)
    llm.generate([1, 2, 3], PARAMS)
    backend = llm._runner._backend
    backend._pool.run(lambda index: None, 2)  # starts the threads
    threads = list(backend._pool._helpers)
    kept = [weakref.ref(layer) for layer in backend.cache.layers] + [weakref.ref(backend._ops)]
    seen = close_in_two(llm, files, at, kind)
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    assert not [ref for ref in kept if ref() is not None]
    return seen


def on_the_gpu(path, at, kind=Injected):
    llm = LLM(path, device="cuda", context_length=64)
    runner = llm._runner
    kept = [weakref.ref(runner._machine.cache), weakref.ref(runner._machine.staging)]
    seen = close_in_two(llm, GPU, at, kind)
    assert vars(runner._machine) == {}
    assert runner._gpu.pool.freed
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
    return seen


def test_on_the_cpu(path):
    n_events = on_the_cpu(path, 0)
    assert n_events > 30
    for at in range(1, n_events + 1, 2):
        on_the_cpu(path, at, KeyboardInterrupt if at % 4 == 1 else Injected)


def test_ctrl_c_in_the_step_loop(path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        n_events = on_the_cpu(path, 0, files=LOOP)
        assert n_events > 15
        for at in range(1, n_events + 1, 2):
            on_the_cpu(path, at, Signal, LOOP)
    finally:
        signal.signal(signal.SIGINT, before)


def test_on_a_pretended_gpu(path, gpu):
    n_events = on_the_gpu(path, 0)
    assert n_events > 30
    for at in range(1, n_events + 1, 2):
        on_the_gpu(path, at, KeyboardInterrupt if at % 4 == 1 else Injected)


def test_a_gpu_that_fails_while_closing_is_told_once_and_all_is_freed(path, gpu):
    llm = LLM(path, device="cuda", context_length=64)
    with failing(gpu, "synchronize", "cudaErrorIllegalAddress"), pytest.raises(DeviceError, match="closing the model"):
        llm.close()
    assert vars(llm._runner._machine) == {}
    assert llm._file._parts == []
    llm.close()
