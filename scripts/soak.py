"""Many short requests through one open model, with cancels and shared beginnings: nothing may leak.

    python scripts/soak.py --requests 10000 --device cuda
    python scripts/soak.py --requests 500 --device cpu

At eleven points the memory of the process and that of the device are printed. Ends with status 1 if either has grown
between the second point, when everything has been used once, and the last.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from engine import LLM, SamplingParams

ALLOWED_GROWTH = 32 << 20
"""Bytes that the process may gain: the allocator's own fragments, not ten thousand requests' worth of anything."""


def process_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_bytes(llm: LLM) -> int:
    """Memory taken on the GPU, by whomever; 0 on the CPU."""
    if not llm.device.startswith("cuda"):
        return 0
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


def soak(llm: LLM, n_requests: int, outstanding: int, seed: int) -> list[tuple[int, int, int]]:
    """Runs the requests; returns (requests ended, process bytes, device bytes) at eleven points."""
    random = np.random.default_rng(seed)
    vocab_size = llm.model.config.vocab_size
    beginnings = [random.integers(0, vocab_size, n).tolist() for n in (70, 130, 200)]
    running: set[int] = set()
    points: list[tuple[int, int, int]] = []
    started = ended = 0
    begin = time.perf_counter()
    while ended < n_requests:
        while started < n_requests and len(running) < outstanding:
            ids = random.integers(0, vocab_size, int(random.integers(1, 40))).tolist()
            if random.random() < 0.3:
                ids = beginnings[int(random.integers(3))] + ids
            params = SamplingParams(
                max_tokens=int(random.integers(1, 17)),
                temperature=float(random.choice([0.0, 0.8])),
                repetition_penalty=float(random.choice([1.0, 1.1])),
                logprobs=2 if random.random() < 0.1 else None,
                ignore_eos=True,
                seed=started,
            )
            running.add(llm.add_request(ids, params))
            started += 1
        if random.random() < 0.05:
            llm.cancel(int(random.choice(list(running))))
        for chunk in llm.step():
            if chunk.finish_reason is not None:
                running.discard(chunk.request_id)
                ended += 1
        if ended * 10 // n_requests >= len(points):
            points.append((ended, process_bytes(), device_bytes(llm)))
            print(
                f"{ended:7} requests, {time.perf_counter() - begin:7.1f} s, process {points[-1][1] / 1e6:8.1f} MB, "
                f"device {points[-1][2] / 1e6:9.1f} MB",
                flush=True,
            )
    return points


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Run many short requests and watch the memory.")
    parser.add_argument("model", nargs="?", type=Path, help="default: the bundled model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--outstanding", type=int, default=100, help="requests waiting or running at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--cache-tokens", type=int, default=8192, help="few enough that sequences are preempted")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with LLM(args.model, device=args.device, context_length=args.context_length, cache_tokens=args.cache_tokens) as llm:
        print(f"{llm.device}, {llm.max_sequences} sequences, {args.cache_tokens} positions in all")
        points = soak(llm, args.requests, args.outstanding, args.seed)
    (_, process, device), (_, process_end, device_end) = points[1], points[-1]
    grown = max(0, process_end - process), max(0, device_end - device)
    print(f"grown by {grown[0] / 1e6:.1f} MB in the process and {grown[1] / 1e6:.1f} MB on the device")
    sys.exit(1 if grown[0] > ALLOWED_GROWTH or grown[1] > 2 << 20 else 0)


if __name__ == "__main__":
    main()
