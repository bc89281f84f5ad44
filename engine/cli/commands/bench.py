"""gguf-engine bench: how fast a model runs here, and how fast it could."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.options import shared
from engine.cli.options.groups import Without, with_groups
from engine.cli.options.opening import CACHE_FIELDS, CHAT_FIELDS, Opening
from engine.cli.terminal import open_model, status, write, write_json
from engine.concurrency.collector import leave_out_what_is_alive
from engine.config import MAX_SEQUENCES, PAGE, page_count
from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from engine.api.bench import BenchResult, Speed
    from engine.api.llm import LLM
    from engine.model.brick_time import BrickTime


@with_groups
def bench(
    model: shared.ModelOption = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", help="Length of the prompt timed, in tokens; 0 skips it.")
    ] = 512,
    gen_tokens: Annotated[
        int, typer.Option("--gen-tokens", "-n", help="Tokens that each sequence generates; 0 skips it.")
    ] = 128,
    depth: Annotated[int, typer.Option("--depth", "-d", help="Tokens in the cache beforehand.")] = 0,
    sequences: Annotated[
        str, typer.Option("--sequences", "--batch", "-b", help="Sequences side by side; several numbers as 1,4,16.")
    ] = "1",
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Timed runs, after one that is not.")] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="Also time every brick of a decode step (GPU).")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Launch kernel by kernel, without a captured graph.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Write a JSON object to stdout, one line for each number of sequences.")
    ] = False,
    *,
    opening: Annotated[
        Opening,
        Without("context_length", "pre_tokenizer", *CACHE_FIELDS, *CHAT_FIELDS),
    ],
) -> None:
    """Measure prompt and decode speed, in tokens/s, GB/s and percent of this machine's read bandwidth."""
    batches = _numbers(sequences)
    context_length = max(depth + max(prompt_tokens + 1, gen_tokens + 2), 2)
    config = opening.config(
        model,
        context_length=context_length,
        max_sequences=max(batches),
        # Whole pages for everybody, or sequences would make room for one another while they are timed.
        cache_tokens=(max(batches) + 1) * PAGE * page_count(context_length),
        eager=eager,
    )
    with open_model(config) as llm:
        leave_out_what_is_alive()  # as a server does
        settings = {"prompt_tokens": prompt_tokens, "gen_tokens": gen_tokens, "depth": depth}
        if profile:
            from engine.api.bench import require_profile

            require_profile(llm)
        with status("measuring the memory bandwidth ..."):
            bandwidth = llm.read_bandwidth()
        common = {
            "model": str(llm.config.model),
            "device": llm.device,
            "threads": llm.threads,
            "kv_type": config.kv_type,
            "load_seconds": llm.load_seconds,
            "repetitions": repetitions,
            **settings,
        }
        for number, batch in enumerate(batches):  # each told when it is known: who interrupts keeps those before
            result = _measure(llm, batch, repetitions=repetitions, **settings)
            if not json and number == 0:
                _show_head(common)
            report = {**common, "batch": batch, **_speeds(result, bandwidth)}
            bricks = _profile(llm, depth=depth, batch=batch) if profile else []
            if json:
                write_json(report | ({"profile": [brick.as_dict(bandwidth) for brick in bricks]} if profile else {}))
                continue
            _show(report)
            if profile:
                from engine.model.brick_time import profile_table

                write(profile_table(bricks, bandwidth) + "\n")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(1 <= number <= MAX_SEQUENCES for number in numbers):
        raise InvalidRequestError(
            f"--sequences is {text!r}; it is a number from 1 to {MAX_SEQUENCES}, or several as 1,4,16"
        )
    return numbers


def _speeds(result: BenchResult, bandwidth: float | None) -> dict[str, Any]:
    read = result.decode_bytes_s
    return {
        "prompt_tok_s": result.prompt.median if result.prompt else None,
        "prompt_tok_s_range": _range(result.prompt),
        "decode_tok_s": result.decode.median if result.decode else None,
        "decode_tok_s_range": _range(result.decode),
        "bytes_per_step": result.bytes_per_step,
        "decode_gb_s": read / 1e9 if read else None,
        "bandwidth_gb_s": bandwidth / 1e9 if bandwidth else None,
        "bandwidth_percent": 100 * read / bandwidth if read and bandwidth else None,
    }


def _profile(llm: LLM, *, depth: int, batch: int) -> list[BrickTime]:
    from engine.api.bench import profile_bricks

    with status("timing every brick ..."):
        return profile_bricks(llm, depth=depth, batch=batch)


def _measure(llm: LLM, batch: int, *, repetitions: int, **settings: int) -> BenchResult:
    from rich.console import Console
    from rich.progress import Progress

    from engine.api.bench import run_bench

    runs = (repetitions + 1) * ((settings["prompt_tokens"] > 0) + (settings["gen_tokens"] > 0))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(f"measuring {batch} sequence{'s' if batch > 1 else ''}", total=runs)
        return run_bench(llm, batch=batch, repetitions=repetitions, progress=lambda: progress.advance(task), **settings)


def _range(speed: Speed | None) -> list[float] | None:
    return [speed.low, speed.high] if speed else None


def _show_head(common: dict[str, Any]) -> None:
    threads = f", {common['threads']} threads" if common["threads"] else ""
    write(
        f"{common['model']} on {common['device']}{threads}, {common['kv_type']} cache\n"
        f"loaded in {common['load_seconds']:.2f} s\n"
    )


def _show(report: dict[str, Any]) -> None:
    sequences = f"{report['batch']} sequence{'s' if report['batch'] > 1 else ''}"
    lines = [f"{sequences}, depth {report['depth']}, median of {report['repetitions']} (slowest to fastest)"]
    for kind, length in (("prompt", report["prompt_tokens"]), ("decode", report["gen_tokens"])):
        if report[f"{kind}_tok_s"] is not None:
            low, high = report[f"{kind}_tok_s_range"]
            lines.append(
                f"  {kind} {length:6} tokens  {report[f'{kind}_tok_s']:10.1f} tok/s  ({low:.1f} to {high:.1f})"
            )
    if report["decode_gb_s"] is not None:
        line = f"  decode reads {report['decode_gb_s']:.1f} GB/s"
        if report["bandwidth_percent"] is not None:
            line += f", {report['bandwidth_percent']:.0f} % of the {report['bandwidth_gb_s']:.1f} GB/s measured here"
        lines.append(line)
    write("\n".join(lines) + "\n")
