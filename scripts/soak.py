"""Runs thousands of short requests through one open model and reports its memory on the way, which must stay flat.

    python -m scripts.soak -m model.gguf --device cuda --requests 10000

Prompts share beginnings, some requests are given up, and the cache is small, so that pages are shared, copied, reused
and taken away all the time. Exit status 1 if memory grew by more than --tolerance between the first and the last point.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from engine import LLM, SamplingParams

POINTS = 10
"""Reports on the way. The first one counts as the beginning: until then caches and buffers fill."""


@dataclass(frozen=True)
class Point:
    """One report.

    Attributes:
        ended: requests that are over.
        host: resident bytes of the process.
        device: bytes that the runner holds on a GPU; 0 without one.
    """

    ended: int
    host: int
    device: int


def measure(llm: LLM, ended: int) -> Point:
    """Memory now."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with llm.exclusive_runner() as runner:
        pool = getattr(runner, "pool_bytes", None)
        return Point(ended, resident, pool() if pool is not None else 0)


def run(llm: LLM, requests: int, *, side_by_side: int, seed: int = 0) -> tuple[list[Point], int, int]:
    """Runs the requests, so many at a time; returns the reports, the tokens generated and those found in the cache."""
    dice = random.Random(seed)
    vocabulary = llm.model.config.vocab_size
    longest = min(200, llm.context_length // 2)
    families = [[dice.randrange(vocabulary) for _ in range(longest)] for _ in range(8)]
    running: set[int] = set()
    points: list[Point] = []
    started = ended = generated = cached = 0
    while ended < requests:
        while started < requests and len(running) < side_by_side:
            prompt = [*dice.choice(families)[: dice.randint(1, longest)], dice.randrange(vocabulary)]
            params = SamplingParams(max_tokens=dice.randint(1, 16), seed=started, ignore_eos=True)
            running.add(llm.add_request(prompt, params))
            started += 1
        if dice.random() < 0.05:
            llm.cancel(dice.choice(sorted(running)))
        for chunk in llm.step():
            generated += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                assert chunk.stats is not None
                cached += chunk.stats.cached_tokens
                running.remove(chunk.request_id)
                ended += 1
                if ended % max(requests // POINTS, 1) == 0:
                    points.append(measure(llm, ended))
    return points, generated, cached


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="GGUF file; the bundled model if none is given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--max-sequences", type=int, default=None)
    parser.add_argument("--cache-tokens", type=int, default=4096)
    parser.add_argument("--tolerance", type=float, default=32.0, help="MiB that the host's memory may grow by")
    arguments = parser.parse_args()
    with LLM(
        arguments.model,
        device=arguments.device,
        context_length=1024,
        max_sequences=arguments.max_sequences,
        cache_tokens=arguments.cache_tokens,
    ) as llm:
        begin = time.perf_counter()
        points, generated, cached = run(llm, arguments.requests, side_by_side=2 * llm.max_sequences)
        seconds = time.perf_counter() - begin
        print(f"{arguments.requests} requests in {seconds:.1f} s on {llm.device}: {generated} tokens generated,")
        print(f"{cached} prompt tokens taken from the cache")
        for point in points:
            print(
                f"  after {point.ended:6d}: host {point.host / 2**20:8.1f} MiB, device {point.device / 2**20:8.1f} MiB"
            )
        grown, grown_device = points[-1].host - points[0].host, points[-1].device - points[0].device
        print(f"grown since the first point: host {grown / 2**20:.1f} MiB, device {grown_device / 2**20:.1f} MiB")
        left = llm.active_requests
        print(f"requests left: {left}")
        return int(grown > arguments.tolerance * 2**20 or grown_device > 0 or left > 0)


if __name__ == "__main__":
    raise SystemExit(main())
