"""What a decode step costs the host: time of LLM.step() on a pretended GPU that does nothing.

    python -m scripts.bench_host --sequences 64,256,512

A file of a real model's shapes without weights is opened, requests are queued, and steps in which all of them generate
are timed: planning, launching, reading results, text, and the caller's list of chunks. What the driver takes for a
launch is not in it; steps are replayed graphs, as on a GPU. Prints Markdown: the fastest step and quartiles in
milliseconds, and the slowest one, in which Python's garbage collector may have been at work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from engine import LLM, SamplingParams
from tests.support.gpu.fake_cupy import FakeGpu, install
from tests.support.gpu.fake_runner import sparse_model

PROMPT, CONTEXT = 64, 4096


def step_times(llm: LLM, sequences: int, steps: int) -> list[float]:
    """Seconds of steps in which so many sequences generate."""
    random = np.random.default_rng(0)
    params = SamplingParams(max_tokens=CONTEXT - PROMPT, temperature=0, ignore_eos=True)
    prompts = random.integers(0, llm.model.config.vocab_size, (sequences, PROMPT)).tolist()
    waiting = {llm.add_request(ids, params) for ids in prompts}
    while waiting:
        waiting -= {chunk.request_id for chunk in llm.step()}
    for _ in range(16):
        llm.step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        llm.step()
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    """Parses arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="64,256,512")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--shape", default="llama-3.2-1b", help="of scripts/synthetic_shapes.py")
    args = parser.parse_args()
    print("| sequences | fastest | quartiles | slowest |\n|---|---|---|---|", flush=True)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        path = sparse_model(Path(folder) / "model.gguf", args.shape, vocab=128256)
        install(patch, FakeGpu())
        from engine.cuda import runner
        from engine.cuda.driver import launch

        patch.setattr(launch._bindings(), "cuLaunchKernelEx", lambda *launched: (0,))
        patch.setattr(runner, "availability", lambda index=0: None)
        patch.setattr("engine.cuda.availability", lambda index=0: None)
        for sequences in map(int, args.sequences.split(",")):
            with LLM(
                path,
                device="cuda",
                context_length=CONTEXT,
                max_sequences=sequences,
                cache_tokens=sequences * CONTEXT,
                prefix_cache=False,
            ) as llm:
                times = [1e3 * seconds for seconds in step_times(llm, sequences, args.steps)]
            low, _, high = statistics.quantiles(times, n=4)
            print(f"| {sequences} | {min(times):.2f} | {low:.2f} to {high:.2f} | {max(times):.1f} |", flush=True)


if __name__ == "__main__":
    main()
