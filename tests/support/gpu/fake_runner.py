"""The GPU runner on a pretended card: what it launches, step by step."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.config import PAGE
from engine.cuda.launch_plan.jobs import kernel_jobs
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from engine.request import ActiveSequence, Work
from scripts.make_synthetic_gguf import ALIGNMENT, header, metadata
from scripts.synthetic_models import plan
from scripts.synthetic_shapes import SHAPES
from tests.support.gpu.fake_cupy import FakeGpu, install
from tests.support.gpu.helpers import pages_of

FEW_PAGES = {"max_sequences": 4, "cache_tokens": 256, "prefix_cache": False}

WAYS = (
    pytest.param({}, id="one batch"),
    pytest.param({"max_sequences": 3, "prefill_chunk": 7, "checkpoint_spacing": PAGE}, id="small pieces"),
    pytest.param(FEW_PAGES, id="too few pages"),
    pytest.param({"max_sequences": 1, "cache_tokens": 2048}, id="one after another"),
)
"""Settings of an LLM by which texts must not change."""

MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 120: 170}


@contextmanager
def pretended(monkeypatch, path, arch=90, *, context_length=32, max_sequences=9, kind=FakeGpu, **options):
    """(runner, gpu) of a file on a card of that compute capability; nothing is computed."""
    with monkeypatch.context() as patch:
        gpu = install(patch, kind(arch, MULTIPROCESSORS[arch]))
        from engine.cuda import runner as runners

        patch.setattr(runners, "availability", lambda index=0: None)
        with open_gguf(path) as gguf:
            model = load_model(gguf)
            options = {"kv_type": "f16", "eager": True, "prefill_chunk": 48} | options
            runner = runners.CudaRunner(model, context_length=context_length, max_sequences=max_sequences, **options)
            try:
                yield runner, gpu
            finally:
                runner.close()
                del model


@contextmanager
def pretended_llm(monkeypatch, path, gpu, **settings):
    """An LLM on the pretended card `gpu`; both have what a test looks at: llm.gpu, llm.states, gpu.machine."""
    with monkeypatch.context() as patch:
        install(patch, gpu)
        from engine.cuda import runner as runners

        patch.setattr(runners, "availability", lambda index=0: None)
        patch.setattr("engine.cuda.availability", lambda index=0: None)
        settings = {"context_length": 256, "max_sequences": 8} | settings
        with LLM(path, device="cuda", eager=True, **settings) as llm:
            with llm.exclusive_runner() as runner:
                gpu.machine = runner._machine
                llm.gpu, llm.states = gpu, runner.states
            yield llm


def greedy(length, **options):
    """Parameters of a greedy text of so many tokens, with their log-probabilities."""
    return SamplingParams(max_tokens=length, ignore_eos=True, logprobs=0, temperature=0, **options)


def outcome(result):
    """(token id, log-probability) of each token."""
    return list(zip(result.token_ids, [one.logprob for one in result.logprobs], strict=True))


def launched(gpu, run):
    """(kernel, source) of every launch of run(); the source of a library call is empty."""
    gpu.restart()
    run()
    return [(launch.name, launch.source) for launch in gpu.launches]


def planned(gpu, launches):
    """The same of launches of a plan."""
    return [(launch.kernel, gpu.key(launch.job) if launch.job else "") for launch in launches]


def built(gpu, launch_plan):
    """Sources that are built ahead."""
    return {gpu.key(job) for job in kernel_jobs(launch_plan)}


def decode(runner, n):
    """One decode step over n slots."""
    with runner._running():
        runner._machine.run_step(runner._machine.decode_ops(n), n)


def known(runner, n):
    """The forward pass of a decode step of n rows, some of them beside the slots."""
    with runner._running():
        runner._machine.run_known(n)


def chosen(runner, n):
    """A decode step over n chosen slots."""
    with runner._running():
        runner._machine.run_chosen(n)


def read_prompt(runner, n):
    """A batch of n tokens of one prompt, without logits."""
    with runner._running():
        runner._machine.prompts.hidden(Batch.build([(0, np.arange(n, dtype=np.int32) % 40, 0, Outputs.NONE)]))


def feed(runner, n, *, draws):
    """A piece of n tokens of a prompt in slot 1, which draws the token behind it or not."""
    params = SamplingParams(max_tokens=1, temperature=0)
    sequence = ActiveSequence(1, 1, list(range(n)), [], params, 0, pages=pages_of(runner, 1))
    runner.step([Work(sequence, sequence.prompt_ids, 0, draws)])
    runner.release(1)


def sparse_model(path, name, *, recipe="Q4_K_M", layers=2, vocab=1024, overrides=()):
    """A file of a real model's shapes whose weights are a hole: zeros that take no space."""
    shape = replace(SHAPES[name], layers=layers, vocab=vocab)
    tensors = plan(shape, recipe, list(overrides))
    with path.open("wb") as out:
        out.write(header(metadata(shape, name, recipe), tensors))
        for tensor in tensors:
            start = out.tell()
            if tensor.values is not None:
                out.write(tensor.values.astype("<f4").tobytes())
            out.seek(start + -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT)
        out.truncate(out.tell())
    return path
