"""gguf-engine bench: how fast a model runs here, and how fast it could."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli import options
from engine.cli.terminal import open_model, status, write, write_json

if TYPE_CHECKING:
    from engine.bench import BenchResult, Speed
    from engine.cuda.profile import BrickTime
    from engine.llm import LLM


def bench(
    model: options.ModelOption = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", help="Prompt length timed; 0 skips it.")] = 512,
    gen_tokens: Annotated[int, typer.Option("--gen-tokens", "-n", help="Tokens generated; 0 skips it.")] = 128,
    depth: Annotated[int, typer.Option("--depth", "-d", help="Tokens in the cache beforehand.")] = 0,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences side by side.")] = 1,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Timed runs, after one that is not.")] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="Also time every brick of a decode step (GPU).")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Launch kernel by kernel, without a captured graph.")] = False,
    json: options.JsonOption = False,
    device: options.DeviceOption = "auto",
    kv_type: options.KvTypeOption = "f16",
    threads: options.ThreadsOption = None,
    exact: options.ExactOption = False,
    repack: options.RepackOption = True,
) -> None:
    """Measure prompt and decode speed, in tokens/s, GB/s and percent of this machine's read bandwidth."""
    with open_model(
        model=model,
        device=device,
        context_length=max(depth + max(prompt_tokens + 1, gen_tokens + 2), 2),
        kv_type=kv_type,
        threads=threads,
        exact=exact,
        repack=repack,
        max_sequences=batch,
        cache_tokens=(batch + 1) * max(depth + max(prompt_tokens + 1, gen_tokens + 2), 2),
        eager=eager,
    ) as llm:
        result = _measure(
            llm, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, depth=depth, batch=batch, repetitions=repetitions
        )
        with status("measuring the memory bandwidth ..."):
            bandwidth = llm.read_bandwidth()
        bricks = _profile(llm, depth=depth, batch=batch) if profile else []
        report: dict[str, Any] = {
            "model": str(llm.config.model),
            "device": llm.device,
            "threads": llm.threads,
            "kv_type": kv_type,
            "load_seconds": llm.load_seconds,
            "prompt_tokens": prompt_tokens,
            "gen_tokens": gen_tokens,
            "depth": depth,
            "batch": batch,
            "repetitions": repetitions,
            "prompt_tok_s": result.prompt.median if result.prompt else None,
            "prompt_tok_s_range": _range(result.prompt),
            "decode_tok_s": result.decode.median if result.decode else None,
            "decode_tok_s_range": _range(result.decode),
            "bytes_per_step": result.bytes_per_step,
            "decode_gb_s": result.decode_bytes_s / 1e9 if result.decode_bytes_s else None,
            "bandwidth_gb_s": bandwidth / 1e9 if bandwidth else None,
            "bandwidth_percent": 100 * result.decode_bytes_s / bandwidth
            if result.decode_bytes_s and bandwidth
            else None,
        }
        if profile:
            report["profile"] = [brick.as_dict(bandwidth) for brick in bricks]
    if json:
        write_json(report)
        return
    _show(report)
    if profile:
        from engine.cuda.profile import table

        write(table(bricks, bandwidth) + "\n")


def _profile(llm: LLM, *, depth: int, batch: int) -> list[BrickTime]:
    from engine.bench import profile_bricks

    with status("timing every brick ..."):
        return profile_bricks(llm, depth=depth, batch=batch)


def _measure(llm: LLM, *, repetitions: int, **settings: int) -> BenchResult:
    from rich.console import Console
    from rich.progress import Progress

    from engine.bench import run_bench

    runs = (repetitions + 1) * ((settings["prompt_tokens"] > 0) + (settings["gen_tokens"] > 0))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("measuring", total=runs)
        return run_bench(llm, repetitions=repetitions, progress=lambda: progress.advance(task), **settings)


def _range(speed: Speed | None) -> list[float] | None:
    return [speed.low, speed.high] if speed else None


def _show(report: dict[str, Any]) -> None:
    threads = f", {report['threads']} threads" if report["threads"] else ""
    lines = [
        f"{report['model']} on {report['device']}{threads}, {report['kv_type']} cache",
        f"loaded in {report['load_seconds']:.2f} s",
        f"depth {report['depth']}, batch {report['batch']}, median of {report['repetitions']} (slowest to fastest)",
    ]
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
