"""Calls of the GPU runner that an exception cuts short at any line: the next calls do what they do alone.

On a pretended card that moves what the host sends, later and only when the host waits.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.cuda.driver.graphs import PATIENCE
from engine.errors import DeviceError
from engine.gguf.types import GGMLType
from engine.request import ActiveSequence, TokenSample, Work
from engine.sampling import SamplingParams
from tests.support.gpu.fake_cupy import failing
from tests.support.gpu.fake_runner import pretended
from tests.support.gpu.helpers import typed_model
from tests.support.gpu.moving_gpu import MovingGpu
from tests.support.injection import Injection, engine_files

FILES = engine_files(
    *(f"cuda/driver/{name}.py" for name in ("staging", "row_store", "graphs", "context")),
    *(f"cuda/step/{name}.py" for name in ("machine", "prompt_ops", "prompt", "run_ahead")),
    *("cuda/attention/cache.py", "cuda/sampling/slots.py", "cuda/runner.py"),
)
PAGES = 6
FAULT = "cudaErrorMemoryAllocation: out of memory"


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """A runner of a tiny model whose cache holds a number in every page, and its card."""
    path = typed_model(tmp_path, GGMLType.F32)
    sizes = {"context_length": 128, "max_sequences": 3, "cache_tokens": PAGES * 64, "eager": False, "prefill_chunk": 8}
    with pretended(monkeypatch, path, kind=MovingGpu, **sizes) as (runner, gpu):
        fill(runner)
        gpu.finish()
        yield runner, gpu


def arrays(runner):
    return [array for layer in runner._machine.cache.layers for array in layer.paged]


def fill(runner):
    for number, array in enumerate(arrays(runner)):
        for page in range(PAGES):
            array[page] = 16 * number + page


def pages(runner, gpu):
    """The page that every page of every array holds; all of it must be of one page."""
    gpu.finish()
    found = []
    for number, array in enumerate(arrays(runner)):
        content = np.asarray(array).reshape(PAGES, -1) - 16 * number
        assert (content == content[:, :1]).all()
        found.append(content[:, 0].astype(int).tolist())
    assert all(one == found[0] for one in found)
    return found[0]


def sequence(slot, held, prompt=9, **params):
    one = ActiveSequence(7 + slot, slot, list(range(prompt)), [], SamplingParams(**params), 0, pages=held)
    one.n_cached = 0
    return one


def read(runner, slot=0, held=(2, 3)):
    one = sequence(slot, list(held))
    return runner.step([Work(one, one.prompt_ids, 0, True)])


def decode(runner, slot=1, held=(4,), start=5):
    one = sequence(slot, list(held))
    return runner.step([Work(one, [17], start, True, decode=True)])


CALLS = {
    "prompt": read,
    "decode": decode,
    "score": lambda runner: runner.score(Work(sequence(0, [2, 3], prompt_logprobs=0), list(range(8)), 0, False)),
    "logits": lambda runner: runner.logits(list(range(20))),
    "copy": lambda runner: runner.copy_pages([(0, 0)]),
    "save": lambda runner: runner.save_pages([0, 1]),
    "load": lambda runner: runner.load_pages(runner.save_pages([5, 0]), [5, 0]),
}


def check_calls(runner, gpu):
    """Page copies, a page saved and loaded, and a step each have their own effects and no other."""
    runner.copy_pages([(1, 5), (2, 0)])
    assert not runner._gpu.stream.capturing
    assert pages(runner, gpu) == [2, 1, 2, 3, 4, 1]
    saved = runner.save_pages([3, 5])
    runner.load_pages(saved, [5, 0])
    assert pages(runner, gpu) == [1, 1, 2, 3, 4, 3]
    fill(runner)
    decode(runner, slot=2, held=(5, 1), start=70)
    gpu.finish()
    machine = runner._machine
    assert machine.cache.block_table[2].tolist() == [5, 1]
    assert machine.slots.positions.tolist() == [-1, -1, 70]
    assert machine.slots.tokens[2] == 17
    runner.release(2)
    read(runner)
    gpu.finish()
    assert machine.cache.block_table[0].tolist() == [2, 3]
    assert machine.slots.positions.tolist() == [8, -1, -1]
    assert machine.prompt_ops._cache is machine.cache
    runner.release(0)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_cut_short_at_any_line_leaves_nothing(opened, name):
    runner, gpu = opened
    call = CALLS[name]
    counting = Injection(0, FILES, events=("line",))
    check_calls(runner, gpu)
    counting.during(lambda: call(runner))
    runner.release(0)
    runner.release(1)
    assert counting.seen > 20
    stride = 1 if counting.seen < 150 else counting.seen // 75
    for at in range(1, counting.seen + 1, stride):
        injection = Injection(at, FILES, KeyboardInterrupt, events=("line",))
        injection.during(lambda: call(runner))
        try:
            for slot in range(runner.max_sequences):  # the sequences of that call end
                runner.release(slot)
            check_calls(runner, gpu)
        except BaseException as error:
            error.add_note(f"after {injection.where}")
            raise


def test_pages_are_saved_in_pageable_memory_where_no_other_is_left(opened):
    runner, gpu = opened
    with failing(gpu, "pinned", FAULT):
        saved = runner.save_pages([4, 1])
        assert not saved.pinned
    runner.load_pages(saved, [0, 2])
    assert pages(runner, gpu) == [4, 1, 1, 3, 4, 5]
    fill(runner)
    check_calls(runner, gpu)


def test_no_host_memory_at_all_ends_one_call(opened, monkeypatch):
    runner, gpu = opened

    def empty(*_):
        raise MemoryError("no 512 bytes left")

    with failing(gpu, "pinned", FAULT), monkeypatch.context() as patch:
        patch.setattr("engine.cuda.driver.row_store.np.empty", empty)
        with pytest.raises(DeviceError, match=r"the host ran out of memory .*no 512 bytes"):
            runner.save_pages([4, 1])
    check_calls(runner, gpu)


def test_no_memory_for_masks_ends_the_constrained_sequence_alone(opened):
    runner, gpu = opened
    free, bound = sequence(0, [2]), sequence(1, [4])
    bits = np.zeros(runner.config.vocab_size // 32 + 1, np.uint32)
    bound.mask = SimpleNamespace(bits=lambda output: bits, prepare=lambda wanted: None)
    with failing(gpu, "pinned", FAULT):
        found = runner.step([Work(one, [17], 5, True, decode=True) for one in (free, bound)])
    assert isinstance(found[0], TokenSample)
    assert isinstance(found[1], DeviceError)
    runner.release(0)
    check_calls(runner, gpu)


@pytest.mark.parametrize("fault", ["instantiate", "replay"])
def test_steps_without_memory_for_a_graph_run_by_hand_until_there_is_some(opened, fault, caplog):
    runner, gpu = opened
    graphs = runner._machine._graphs
    with failing(gpu, fault, FAULT):
        for _ in range(3):
            decode(runner)
        assert not graphs._graphs
        runner.release(1)
        check_calls(runner, gpu)
    assert len([one for one in caplog.records if "GPU memory is full" in one.getMessage()]) == 1
    for _ in range(PATIENCE + 2):
        decode(runner)
    assert graphs._graphs


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fault", ["launch", "device", "synchronize"])
def test_an_error_of_the_gpu_is_told_by_every_call(opened, name, fault):
    runner, gpu = opened
    with failing(gpu, fault, "cudaErrorIllegalAddress: an illegal memory access was encountered"):
        if fault == "synchronize" and name in ("score", "copy", "save", "load"):  # they wait for nothing here
            CALLS[name](runner)
            return
        with pytest.raises(DeviceError, match="restart the program"):
            CALLS[name](runner)
    for call in CALLS.values():
        with pytest.raises(DeviceError, match=r"failed before .*restart the program"):
            call(runner)


@pytest.mark.parametrize("name", CALLS)
def test_memory_that_runs_out_ends_one_call_alone(opened, name):
    runner, gpu = opened
    with failing(gpu, "launch", FAULT), pytest.raises(DeviceError, match=r"out of memory while running .*device='cpu'"):
        CALLS[name](runner)
    check_calls(runner, gpu)
