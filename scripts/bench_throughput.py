"""Output tokens per second of many requests at once: whole workloads, and decode steps of 1 to 1024 sequences.

    python -m scripts.bench_throughput /tmp/8b.gguf --requests 768
    python -m scripts.bench_throughput /tmp/8b.gguf --workloads 128/128 --curve 64,96,128,256,512 --plot curve.svg
    python -m scripts.bench_throughput /tmp/8b.gguf --workloads 128/128,2048/128 --requests 768,256 --curve ""

A workload in/out is a number of requests, all queued at once, with so many random prompt tokens and so many generated
ones (greedy, no end token): output tokens over the seconds from the first request to the last token, text included. It
is TensorRT-LLM's table of maximum throughput. A point of the curve is the mean over the steps in which that many
sequences, with prompts of 64 tokens, all generate (where sequences take turns, some of these are two steps of the GPU);
a range is that of the middle half. "Waiting" is the share of the
time in which the host waited for the GPU: near 0 %, the host is what limits the speed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import LLM, SamplingParams
from engine.concurrency.collector import leave_out_what_is_alive
from scripts.plot_arrivals import panel

WORKLOADS = "128/128,500/2000,1000/1000,2048/128,2048/2048"
CURVE = "1,2,4,8,16,32,64,96,128,192,256,384,512,768,1024"
PROMPT = 64


@dataclass(frozen=True)
class Run:
    """One workload: seconds, output and prompt tokens per second, share of the time waited for the GPU, steps."""

    seconds: float
    output: float
    total: float
    waiting: float | None
    steps: int


class Waiting:
    """Seconds that a GPU runner's host spends waiting for results."""

    def __init__(self, llm: LLM) -> None:
        self.seconds = 0.0
        with llm.exclusive_runner() as runner:
            machine: Any = getattr(runner, "_machine", None)
        self.known = machine is not None
        if self.known:
            wait = machine.wait

            def timed(place: int) -> None:
                begin = time.perf_counter()
                wait(place)
                self.seconds += time.perf_counter() - begin

            machine.wait = timed


def random_ids(llm: LLM, length: int, random: np.random.Generator) -> list[int]:
    """A prompt that is in no cache."""
    return [int(n) for n in random.integers(0, llm.model.config.vocab_size, length)]


def workload(llm: LLM, waiting: Waiting, requests: int, prompt: int, output: int) -> Run:
    """Runs requests of a workload to their ends."""
    random = np.random.default_rng()
    params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    prompts = [random_ids(llm, prompt, random) for _ in range(requests)]
    gc.collect()
    waited, begin, steps = waiting.seconds, time.perf_counter(), 0
    left = {llm.add_request(ids, params) for ids in prompts}
    while left:
        left -= {chunk.request_id for chunk in llm.step() if chunk.finish_reason is not None}
        steps += 1
    seconds = time.perf_counter() - begin
    share = (waiting.seconds - waited) / seconds if waiting.known else None
    return Run(seconds, requests * output / seconds, requests * (prompt + output) / seconds, share, steps)


def point(llm: LLM, sequences: int, steps: int) -> tuple[float, float, float]:
    """Mean, lower and upper quartile of seconds of a step in which so many sequences generate."""
    random = np.random.default_rng()
    most = min(llm.context_length - PROMPT, 4096)
    params = SamplingParams(max_tokens=most, temperature=0, ignore_eos=True)
    waiting = {llm.add_request(random_ids(llm, PROMPT, random), params) for _ in range(sequences)}
    everyone = list(waiting)
    while waiting:
        waiting -= {chunk.request_id for chunk in llm.step()}
    for _ in range(16):  # the first of a number of rows are launched by hand and captured
        llm.step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        chunks = llm.step()
        times.append(time.perf_counter() - begin)
        assert len(chunks) == sequences, f"{len(chunks)} of {sequences} sequences were in a step"
    for request_id in everyone:
        llm.cancel(request_id)
    while llm.active_requests:
        llm.step()
    llm.step()
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.fmean(times), low, high


def curve(llm: LLM, numbers: list[int], steps: int) -> list[tuple[int, float]]:
    """Prints a row per number of sequences; returns (sequences, tokens per second)."""
    print("\n| sequences | tok/s | ms a step | middle half |\n|---|---|---|---|", flush=True)
    found = []
    for number in numbers:
        middle, low, high = point(llm, number, steps)
        found.append((number, number / middle))
        print(
            f"| {number} | {number / middle:.0f} | {middle * 1e3:.2f} | {low * 1e3:.2f} to {high * 1e3:.2f} |",
            flush=True,
        )
    return found


def plot(points: list[tuple[int, float]], path: Path) -> None:
    """The curve as SVG."""
    end, high = max(x for x, _ in points), max(y for _, y in points)
    lines = panel(60, 46, "tokens per second by sequences", [(float(x), y) for x, y in points], float(end), high)
    body = "\n".join(line.replace(" s</text>", "</text>") for line in lines)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="520" height="260">\n{body}\n</svg>\n')


def main() -> None:
    """Parses arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workloads", default=WORKLOADS, help="in/out, several with commas; '' for none")
    parser.add_argument("--requests", default="768", help="of each workload, or a number for each, with commas")
    parser.add_argument("--curve", default=CURVE, help="numbers of sequences; '' for none")
    parser.add_argument("--steps", type=int, default=40, help="steps of a point of the curve")
    parser.add_argument("--max-sequences", type=int, help="left out: the engine's default, which bounds the curve")
    parser.add_argument("--cache-tokens", type=int, help="left out: the engine's default")
    parser.add_argument("--context", type=int, help="left out: what the workloads and the curve need")
    parser.add_argument("--kv-type", default="f16", help="number format of the cache (default: f16)")
    parser.add_argument("--target", default=None, help="throughput or latency; left out: the engine's default")
    parser.add_argument("--deterministic", action="store_true", help="bits of a row that no number of rows changes")
    parser.add_argument("--repetitions", type=int, default=2, help="of each workload, the first not counted if several")
    parser.add_argument("--plot", type=Path, help="write the curve as SVG")
    args = parser.parse_args()
    shapes = [tuple(int(n) for n in one.split("/")) for one in args.workloads.split(",") if one]
    numbers = [int(one) for one in args.curve.split(",") if one]
    requests = [int(one) for one in args.requests.split(",")]
    if len(requests) not in (1, len(shapes)):
        parser.error(
            f"--requests {args.requests}: {len(requests)} numbers for {len(shapes)} workloads; give one, or one each"
        )
    context = args.context or max([sum(shape) for shape in shapes] + [1024 if numbers else 64])
    more = {} if args.target is None else {"target": args.target}
    with LLM(
        args.model,
        args.device,
        context_length=context,
        kv_type=args.kv_type,
        max_sequences=args.max_sequences,
        cache_tokens=args.cache_tokens,
        prefix_cache=False,
        deterministic=args.deterministic,
        **more,
    ) as llm:
        leave_out_what_is_alive()  # as a server does
        plan = llm.memory_plan()
        print(
            f"{args.model.name} on {llm.device}, {llm.max_sequences} sequences, {llm.cache_tokens} tokens of cache "
            f"({args.kv_type}), {plan.total_bytes / 1e9:.1f} GB{', deterministic' if args.deterministic else ''}"
        )
        numbers = [number for number in numbers if number <= llm.max_sequences]
        waiting = Waiting(llm)
        if numbers:
            points = curve(llm, numbers, args.steps)
            if args.plot:
                plot(points, args.plot)
        if shapes:
            print("\n| in/out | requests | output tok/s | all tok/s | seconds | waiting | steps |")
            print("|---|---|---|---|---|---|---|", flush=True)
        for (prompt, output), n_requests in zip(
            shapes, requests * len(shapes) if len(requests) == 1 else requests, strict=True
        ):
            for repetition in range(args.repetitions):
                run = workload(llm, waiting, n_requests, prompt, output)
                if repetition or args.repetitions == 1:
                    share = "" if run.waiting is None else f"{run.waiting:.0%}"
                    print(
                        f"| {prompt}/{output} | {n_requests} | {run.output:.0f} | {run.total:.0f} | "
                        f"{run.seconds:.2f} | {share} | {run.steps} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
