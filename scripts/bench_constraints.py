"""What a constraint costs a decode step, how long masks take, and what forced tokens gain, beside free decoding.

    python -m scripts.bench_constraints /tmp/8b.gguf --sequences 1,16,64 --device cuda

First table: all sequences are constrained by a schema of 20 fields, whose strings have no end of their own in a model
with random weights, or none is; by turns. A figure is the median over the steps in which all sequences generate. Mask
times are those of GrammarMask.bits and GrammarMask.forced together, consumption of the last token included.

Second table: whole answers under a schema of 20 short fields, from the first token to the last, with forced tokens
drawn one at a time and fed together, beside free texts of the same lengths. Tokens per second count all tokens.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine import LLM, JsonSchema, SamplingParams
from engine.constraints.matcher import GrammarMask

KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
)
SHORT_KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string", "maxLength": 12},
    {"type": "integer", "minimum": 0, "maximum": 9999},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue"]},
)


def schema_of(kinds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A schema of 20 fields, all of them required."""
    properties = {f"field_{number}": kinds[number % len(kinds)] for number in range(20)}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMA, SHORT_SCHEMA = schema_of(KINDS), schema_of(SHORT_KINDS)
NEVER = 1 << 30
"""As the shortest piece: forced tokens are drawn one at a time."""


class Masks:
    """Seconds of each mask: what was spent on one request between two draws."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._forced: dict[int, float] = {}
        bits, forced = GrammarMask.bits, GrammarMask.forced

        def timed_bits(mask: GrammarMask, output_ids: Sequence[int]) -> Any:
            begin = time.perf_counter()
            found = bits(mask, output_ids)
            self.seconds.append(time.perf_counter() - begin + self._forced.pop(id(mask), 0.0))
            return found

        def timed_forced(mask: GrammarMask, output_ids: Sequence[int]) -> Any:
            begin = time.perf_counter()
            found = forced(mask, output_ids)
            self._forced[id(mask)] = time.perf_counter() - begin
            return found

        for name, made in (("bits", timed_bits), ("forced", timed_forced)):
            setattr(GrammarMask, name, made)

    def columns(self) -> str:
        """Median, 99th percentile and worst in microseconds, as cells of a table."""
        quantiles = statistics.quantiles(self.seconds, n=100)
        return f"{quantiles[49] * 1e6:.0f} | {quantiles[98] * 1e6:.0f} | {max(self.seconds) * 1e6:.0f}"


class Answers(NamedTuple):
    """Texts of all sequences: tokens of each behind its first one, steps, and seconds of these steps."""

    lengths: list[int]
    steps: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return sum(self.lengths) / self.seconds


def started(llm: LLM, all_params: Sequence[SamplingParams]) -> list[int]:
    """Requests that have all given their first token."""
    prompt = llm.tokenizer.encode("Once upon a time")
    running = [llm.add_request(prompt, params) for params in all_params]
    waiting = set(running)
    while waiting:
        for chunk in llm.step():
            waiting.discard(chunk.request_id)
            if chunk.finish_reason is not None:
                raise SystemExit("a text ended before all had begun: choose fewer sequences")
    return running


def answers(llm: LLM, all_params: Sequence[SamplingParams]) -> Answers:
    """Runs requests to their ends, and times them from where all have begun."""
    running = started(llm, all_params)
    lengths, left, steps = dict.fromkeys(running, 0), set(running), 0
    begin = time.perf_counter()
    while left:
        for chunk in llm.step():
            lengths[chunk.request_id] += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                left.discard(chunk.request_id)
        steps += 1
    return Answers(list(lengths.values()), steps, time.perf_counter() - begin)


def whole_answers(llm: LLM, sequences: int, repetitions: int, shortest: int | None) -> str:
    """The row of the second table."""

    def params(seed: int, **options: Any) -> SamplingParams:
        return SamplingParams(temperature=1.0, top_k=40, ignore_eos=True, seed=seed, **options)

    constrained = [params(seed, max_tokens=800, constraint=JsonSchema(SHORT_SCHEMA)) for seed in range(sequences)]
    with llm.exclusive_runner() as runner:
        usual = runner.shortest_piece if shortest is None else shortest

    def run(piece: int) -> Answers:
        with llm.exclusive_runner() as runner:
            runner.shortest_piece = piece
        return answers(llm, constrained)

    together, singly, free = [run(usual)], list[Answers](), list[Answers]()
    for _ in range(repetitions):
        singly.append(run(NEVER))
        together.append(run(usual))
        free.append(answers(llm, [params(seed, max_tokens=n + 1) for seed, n in enumerate(together[0].lengths)]))

    def median(runs: Sequence[Answers], of: Callable[[Answers], float]) -> float:
        return statistics.median(map(of, runs))

    tokens = statistics.mean(together[-1].lengths)
    f, s, t = (median(runs, lambda one: one.tokens_per_second) for runs in (free, singly, together[1:]))
    return (
        f"| {sequences} | {tokens:.0f} | {singly[-1].steps} | {together[-1].steps} | {f:.1f} "
        f"| {s:.1f} ({s / f:.1%}) | {t:.1f} ({t / f:.1%}) |"
    )


def step_seconds(llm: LLM, sequences: int, steps: int, *, constrained: bool) -> float:
    """Median seconds of a step in which all sequences generate."""
    constraint = JsonSchema(SCHEMA) if constrained else None

    def params(seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=steps + 40, temperature=1.0, top_k=40, ignore_eos=True, constraint=constraint, seed=seed
        )

    everyone = started(llm, [params(seed) for seed in range(sequences)])
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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--shortest-piece", type=int, help="tokens fed together from this number on")
    args = parser.parse_args()
    numbers = [int(one) for one in args.sequences.split(",")]
    masks = Masks()
    settings = {"context_length": 1024, "max_sequences": max(numbers), "threads": args.threads}
    with LLM(args.model, args.device, **settings) as llm:
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
            print(f"| {number} | {number / f:.1f} | {number / c:.1f} | {f / c:.1%} | {masks.columns()} |", flush=True)
        print("\n| sequences | tokens of an answer | steps, singly | together | free, tok/s | singly | together |")
        print("|---|---|---|---|---|---|---|", flush=True)
        masks.seconds.clear()
        for number in numbers:
            print(whole_answers(llm, number, args.repetitions, args.shortest_piece), flush=True)
        print(f"\nMasks of whole answers, us: p50, p99, worst {masks.columns()}")


if __name__ == "__main__":
    main()
