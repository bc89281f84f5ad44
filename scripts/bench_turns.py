"""A second turn of a conversation behind a long first one: how many tokens it reads, how long that takes, and its text.

    python -m scripts.bench_turns MODEL.gguf --device cpu --threads 2 --depth 8192
    python -m scripts.bench_turns MODEL.gguf --device cuda

The first prompt is random tokens; the second is the first, its answer and a message. The second runs once behind the
first, and once without reuse of prefixes: both texts and their log-probabilities must be the same, or the script ends
with an error. Greedy; a turn's time is that of the whole call.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from engine import LLM, GenerationResult, SamplingParams


def turn(llm: LLM, name: str, prompt: list[int], params: SamplingParams) -> GenerationResult:
    """Runs a turn and prints what it read."""
    begin = time.perf_counter()
    result = llm.generate(prompt, params)
    seconds, cached = time.perf_counter() - begin, result.stats.cached_tokens
    print(f"{name}: prompt {len(prompt)}, known {cached}, read {len(prompt) - cached}, {seconds:.2f} s", flush=True)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time a second turn behind a long first one.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--depth", type=int, default=8192, help="tokens of the first prompt")
    parser.add_argument("--answer", type=int, default=16, help="tokens generated in each turn")
    parser.add_argument("--message", type=int, default=24, help="tokens of the second message")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    first, message = (rng.integers(0, 1000, n).tolist() for n in (args.depth, args.message))
    params = SamplingParams(max_tokens=args.answer, temperature=0, ignore_eos=True, logprobs=0)
    context = args.depth + args.message + 2 * args.answer + 64
    results = []
    for reuse in (True, False):
        with LLM(
            args.model,
            device=args.device,
            threads=args.threads,
            context_length=context,
            max_sequences=1,
            prefix_cache=reuse,
        ) as llm:
            if reuse:
                answer = turn(llm, "first turn", first, params).token_ids
                second = [*first, *answer, *message]
            results.append(turn(llm, f"second turn, {'behind' if reuse else 'without'} the first", second, params))
    kept, alone = results
    assert kept.token_ids == alone.token_ids, "the texts differ"
    assert kept.logprobs == alone.logprobs, "the log-probabilities differ"
    print("the same text and log-probabilities")


if __name__ == "__main__":
    main()
