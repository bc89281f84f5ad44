"""What a constraint costs a decode step, and how long masks take: free and constrained requests in turns.

    python -m scripts.bench_constraints /tmp/8b.gguf --sequences 1,16,64 --device cuda

All sequences of a run are constrained by a schema of 20 fields, whose strings have no end of their own in a model with
random weights, or none is. A figure is the median over the steps in which all sequences generate. Mask times are those
of GrammarMask.bits, consumption of the last token included. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import LLM, JsonSchema, SamplingParams
from engine.constraints.matcher import GrammarMask
from engine.sampling.constraint import Bits

KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
)
SCHEMA = {
    "type": "object",
    "properties": {f"field_{number}": KINDS[number % len(KINDS)] for number in range(20)},
    "required": [f"field_{number}" for number in range(20)],
    "additionalProperties": False,
}


class Masks:
    """Seconds of each mask."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        make = GrammarMask.bits

        def timed(mask: GrammarMask, output_ids: Sequence[int]) -> Bits:
            begin = time.perf_counter()
            bits = make(mask, output_ids)
            self.seconds.append(time.perf_counter() - begin)
            return bits

        setattr(GrammarMask, "bits", timed)  # noqa: B010 - a type checker refuses the assignment


def step_seconds(llm: LLM, sequences: int, steps: int, *, constrained: bool) -> float:
    """Median seconds of a step in which all sequences generate."""
    constraint = JsonSchema(SCHEMA) if constrained else None

    def params(seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=steps + 40, temperature=1.0, top_k=40, ignore_eos=True, constraint=constraint, seed=seed
        )

    prompt = llm.tokenizer.encode("Once upon a time")
    everyone = [llm.add_request(prompt, params(seed)) for seed in range(sequences)]
    waiting = set(everyone)
    while waiting:
        waiting -= {chunk.request_id for chunk in llm.step()}
    for _ in range(8):  # the first of a number of rows are launched by hand and captured
        llm.step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        chunks = llm.step()
        seconds = time.perf_counter() - begin
        if len(chunks) == sequences:
            times.append(seconds)
        if any(chunk.finish_reason is not None for chunk in chunks):
            break
    for request_id in everyone:
        llm.cancel(request_id)
    while llm.active_requests:
        llm.step()
    llm.step()
    if len(times) < 10:
        raise SystemExit(
            f"only {len(times)} steps had all {sequences} sequences; a text ended early: choose a new seed"
        )
    return statistics.median(times)


def main() -> None:
    """Parses arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", default="1,16,64")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    numbers = [int(one) for one in args.sequences.split(",")]
    masks = Masks()
    with LLM(args.model, args.device, context_length=1024, max_sequences=max(numbers)) as llm:
        begin = time.perf_counter()
        llm.generate("Once", SamplingParams(max_tokens=1, constraint=JsonSchema(SCHEMA)))
        print(f"{args.model.name} on {llm.device}; first constrained request {time.perf_counter() - begin:.2f} s")
        print("\n| sequences | free, tok/s | constrained, tok/s | share | mask p50, us | p99 | worst |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for number in numbers:
            free, bound = [], []
            masks.seconds.clear()
            for _ in range(args.repetitions):
                free.append(step_seconds(llm, number, args.steps, constrained=False))
                bound.append(step_seconds(llm, number, args.steps, constrained=True))
            f, c = statistics.median(free), statistics.median(bound)
            quantiles = statistics.quantiles(masks.seconds, n=100)
            print(
                f"| {number} | {number / f:.1f} | {number / c:.1f} | {f / c:.1%} | {quantiles[49] * 1e6:.0f} "
                f"| {quantiles[98] * 1e6:.0f} | {max(masks.seconds) * 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
