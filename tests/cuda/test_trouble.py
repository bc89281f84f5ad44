"""What goes wrong around a real GPU: damaged caches, interrupts, memory that runs out, forks."""

import os
import signal
import subprocess
import sys

import pytest

from engine import LLM, SamplingParams
from engine.api.llm import BUNDLED_MODEL
from engine.cuda.driver import graphs
from engine.errors import DeviceError
from tests.support.damage import WAYS
from tests.support.gpu.helpers import generate, opened, pages_of, token_ids
from tests.support.injection import without_collector_callbacks

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPT = list(range(40, 240))


def no_memory():
    import cupy

    return cupy.cuda.runtime.CUDARuntimeError(2)


def run_once(folder):
    """A text made by a process of its own, with kernel caches in a folder.

    Its settings name what would be chosen by the memory that is free: beside other processes, the second run would
    take a smaller cache or fewer rows of prompts, and so other kernels.
    """
    code = (
        "from engine import LLM, SamplingParams\n"
        "with LLM(device='cuda', context_length=128, max_sequences=1, cache_tokens=128, prefill_chunk=128) as llm:\n"
        "    print(llm.generate('Once', SamplingParams(max_tokens=5, temperature=0)).text)"
    )
    caches = {"GGUF_ENGINE_CACHE": str(folder / "ours"), "CUPY_CACHE_DIR": str(folder / "cupy")}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | caches, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_damaged_cubins_are_replaced_and_never_loaded(tmp_path):
    text = run_once(tmp_path)
    assert not [path for path in (tmp_path / "cupy").rglob("*") if path.is_file()], "CuPy compiled a kernel of its own"
    files = sorted((tmp_path / "ours").rglob("*.cubin"))
    whole = {path: path.read_bytes() for path in files}
    ways = list(WAYS.values())
    for number, path in enumerate(files):
        path.write_bytes(ways[number % len(ways)](whole[path]))
    assert run_once(tmp_path) == text
    assert [path.name for path in files if path.read_bytes() != whole[path]] == []
    assert sorted((tmp_path / "ours").rglob("*")) == sorted({*files, files[0].parent})


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
def test_interrupts_at_any_moment_leave_a_model_that_works():
    """Real signals in prompts that begin with a copied page, in logits() and in decode steps."""

    def interrupt(number, frame):
        signal.raise_signal(signal.SIGINT)

    prompts = [[*PROMPT[: 100 + turn % 50], 9] for turn in range(3)]
    with without_collector_callbacks(), LLM(device="cuda", context_length=512, deterministic=True) as llm:
        texts = [llm.generate(prompt, GREEDY).token_ids for prompt in prompts]
        before = signal.signal(signal.SIGALRM, interrupt), signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted = 0
        try:
            for turn in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0001 + turn % 60 * 0.00005)
                    if turn % 3 == 2:
                        llm.logits(PROMPT)
                    else:
                        llm.generate([*PROMPT[: 60 + turn % 90], turn], GREEDY)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                if turn % 10 == 0:
                    assert [llm.generate(prompt, GREEDY).token_ids for prompt in prompts] == texts
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before[0])
            signal.signal(signal.SIGINT, before[1])
        assert interrupted > 100
        assert [llm.generate(prompt, GREEDY).token_ids for prompt in prompts] == texts


def test_pages_in_pageable_memory_come_back_bit_for_bit(monkeypatch):
    import cupy

    def refuse(n_bytes):
        raise no_memory()

    with opened(BUNDLED_MODEL, max_sequences=2) as runner:
        first = token_ids(generate(runner, PROMPT, 5, slot=0))
        held = pages_of(runner, 0)[:4]
        arrays = [array for layer in runner._machine.cache.layers for array in layer.paged]
        before = [array[held].get() for array in arrays]
        with monkeypatch.context() as patch:
            patch.setattr(cupy.cuda, "alloc_pinned_memory", refuse)
            saved = runner.save_pages(held)
        assert not saved.pinned
        generate(runner, PROMPT[::-1], 5, slot=0)
        target = pages_of(runner, 1)[:4]
        runner.load_pages(saved, target)
        runner._gpu.stream.synchronize()
        after = [array[target].get() for array in arrays]
        assert all(part.any() for part in before)
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
        assert token_ids(generate(runner, PROMPT, 5, slot=0)) == first


@pytest.mark.parametrize("error", [no_memory, KeyboardInterrupt])
def test_a_capture_that_fails_is_ended_and_tried_again(monkeypatch, error):
    """Without memory the step runs by hand; an interrupt inside a capture leaves nothing of it on the stream."""
    monkeypatch.setattr(graphs, "PATIENCE", 3)
    with opened(BUNDLED_MODEL, deterministic=True) as runner:
        text = token_ids(generate(runner, PROMPT, 20))
    with opened(BUNDLED_MODEL, deterministic=True) as runner:
        run, machine = runner._machine.run_step, runner._machine

        def fail_in_capture(ops, n):
            run(ops, n)
            if runner._gpu.stream.is_capturing():
                raise error()

        monkeypatch.setattr(machine, "run_step", fail_in_capture, raising=False)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                generate(runner, PROMPT, 20)
        else:
            assert token_ids(generate(runner, PROMPT, 20)) == text
        assert not machine._graphs._graphs
        del machine.run_step
        assert token_ids(generate(runner, PROMPT, 20)) == text
        assert machine._graphs._graphs


def test_the_child_of_a_fork_gets_a_clear_error():
    with LLM(device="cuda", context_length=128) as llm:
        text = llm.generate([5, 6], GREEDY).token_ids
        child = os.fork()
        if child == 0:
            told = []
            try:
                for use in (lambda: llm.generate([5, 6], GREEDY), lambda: LLM(device="cuda", context_length=128)):
                    try:
                        use()
                    except DeviceError as error:
                        told.append("spawn" in str(error))
                llm.close()
            finally:
                os._exit(0 if told == [True, True] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert llm.generate([5, 6], GREEDY).token_ids == text
