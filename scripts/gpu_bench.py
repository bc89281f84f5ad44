"""Speed, start-up time and memory on a GPU, with synthetic models of real shapes; writes a dated report.

    python -m scripts.gpu_bench --models 1b,8b,8b-q8 --time-limit 270
    python -m scripts.gpu_bench --models 1b --only decode,profile --keep --dir /tmp/models

Files are made by make_synthetic_gguf.py (and removed afterwards, unless --keep or already there). Each model is
measured in a process of its own; a case that does not finish within the time limit is left out and named, and what was
measured before it is kept. Token ids are random, decoding is greedy and does not stop at an end token. A speed is the
median of the repetitions, with the slowest and the fastest; decode speeds count whole steps of the engine, text and
all, after the first token. Bytes per step are the file's weights (of an embedding table only rows) and the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

MODELS = {
    "1b": ("llama-3.2-1b", "Q4_K_M"),
    "8b": ("llama-3.1-8b", "Q4_K_M"),
    "8b-q8": ("llama-3.1-8b", "Q8_0"),
    "30b-a3b": ("qwen3-30b-a3b", "Q4_K_M"),
    "mamba-2.8b": ("mamba-2.8b", "Q4_K_M"),
    "rwkv7-2.9b": ("rwkv7-2.9b", "Q4_K_M"),
    "9b-hybrid": ("qwen3.5-9b", "Q4_K_M"),
    "9b-attention": ("attention-9b", "Q4_K_M"),
    "35b-hybrid": ("qwen3.5-35b-a3b", "Q4_K_M"),
    "35b-attention": ("attention-35b-a3b", "Q4_K_M"),
}
DEFAULT = ("1b", "8b", "8b-q8", "30b-a3b", "mamba-2.8b")
DEPTH = 8192
LONG = 32768
CASES: dict[str, dict[str, int]] = {
    "decode": {"prompt_tokens": 0, "gen_tokens": 256, "depth": 128, "batch": 1},
    "depth": {"prompt_tokens": 0, "gen_tokens": 128, "depth": DEPTH, "batch": 1},
    "depth32768": {"prompt_tokens": 0, "gen_tokens": 128, "depth": LONG, "batch": 1},
    **{f"batch{n}": {"prompt_tokens": 0, "gen_tokens": 128, "depth": 128, "batch": n} for n in (4, 8, 16, 32, 64)},
    "prefill": {"prompt_tokens": 512, "gen_tokens": 0, "depth": 0, "batch": 1},
    "prefill4096": {"prompt_tokens": 4096, "gen_tokens": 0, "depth": 0, "batch": 1},
    "prefill32768": {"prompt_tokens": LONG, "gen_tokens": 0, "depth": 0, "batch": 1},
    "prefilldepth": {"prompt_tokens": 512, "gen_tokens": 0, "depth": DEPTH, "batch": 1},
}
RUNNING, ARRIVING = 4, 64
PARTS = ("start", *CASES, "arrivals", "profile")
LLAMA_CPP_H200 = {
    ("1b", "decode"): 907, ("8b", "decode"): 278, ("8b-q8", "decode"): 256,
    ("1b", "depth"): 797, ("8b", "depth"): 244, ("8b-q8", "depth"): 226,
    ("1b", "prefill"): 37600, ("8b", "prefill"): 9450, ("8b-q8", "prefill"): 10900,
    ("1b", "batch4"): 2373, ("8b", "batch4"): 703, ("1b", "batch16"): 6132, ("8b", "batch16"): 2047,
    ("1b", "batch32"): 9653, ("8b", "batch32"): 3228, ("1b", "batch64"): 11588, ("8b", "batch64"): 4491,
    ("30b-a3b", "decode"): 301, ("30b-a3b", "depth"): 252,
    ("30b-a3b", "prefill"): 8000, ("30b-a3b", "prefilldepth"): 6640,
    ("1b", "prefilldepth"): 29400, ("8b", "prefilldepth"): 8030, ("8b-q8", "prefilldepth"): 9160,
}  # fmt: skip
"""tok/s of llama.cpp (October 2026, CUDA build, flash attention and graphs on) on one H200, for files like these."""


# ---- in the process of one model ------------------------------------------------------------------------------------


def first_token(path: Path, started: float) -> dict[str, float]:
    """Seconds from the start of the process to the first token, and the GPU memory taken by then."""
    import cupy

    cupy.cuda.Device(0).use()
    free = int(cupy.cuda.runtime.memGetInfo()[0])  # with the driver's own context, which no program can avoid
    imported = time.time()
    from engine import LLM, SamplingParams

    with LLM(path, device="cuda") as llm:
        llm.generate("Once upon a time", SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        seconds = time.time() - started
        plan = llm.memory_plan()
        taken = free - int(cupy.cuda.runtime.memGetInfo()[0])
        return {
            "seconds_to_first_token": seconds,
            "seconds_to_context": imported - started,
            "load_seconds": llm.load_seconds,
            "gpu_bytes": taken,
            "weights_bytes": plan.weights_bytes,
            "kv_bytes": plan.kv_bytes,
            "overhead_bytes": taken - plan.weights_bytes - plan.kv_bytes - plan.state_bytes,
        }


def measure(path: Path, cases: list[str], repetitions: int, emit: Callable[[dict[str, Any]], None]) -> None:
    """Runs the cases of one model and hands each result over as soon as it is there."""
    from engine import LLM
    from engine.api.bench import run_bench

    chosen = [CASES[case] for case in cases if case in CASES]
    needed = max((one["depth"] + max(one["gen_tokens"], one["prompt_tokens"]) + 2 for one in chosen), default=0)
    slots = max((one["batch"] for one in chosen), default=1)
    if "arrivals" in cases:
        slots = max(slots, RUNNING + ARRIVING)
    context = max(needed, 1024, DEPTH + 64 if "profile" in cases else 0)
    with LLM(
        path, device="cuda", context_length=context, max_sequences=slots, cache_tokens=max(context, 1 << 17)
    ) as llm:
        ceiling = llm.read_bandwidth()
        emit({"case": "open", "device": llm.device, "load_seconds": llm.load_seconds, "bandwidth_bytes_s": ceiling})
        for case in cases:
            if case in CASES:
                runs = min(repetitions, 3) if case in ("depth", "depth32768", "prefill32768") else repetitions
                result = run_bench(llm, repetitions=runs, **CASES[case])  # type: ignore[arg-type]
                speed = result.decode or result.prompt
                assert speed is not None
                emit(
                    {
                        "case": case,
                        **CASES[case],
                        "tok_s": speed.median,
                        "tok_s_range": [speed.low, speed.high],
                        "bytes_per_step": result.bytes_per_step if result.decode else None,
                        "gb_s": result.decode_bytes_s / 1e9 if result.decode_bytes_s else None,
                        "percent": 100 * result.decode_bytes_s / ceiling if result.decode_bytes_s and ceiling else None,
                    }
                )
        if "arrivals" in cases:
            arrivals(llm, seed=1)  # builds what is built when first needed
            emit({"case": "arrivals", **arrivals(llm, seed=2)})
        if "profile" in cases:
            from engine.api.bench import profile_bricks
            from engine.model.brick_time import profile_table

            for depth in (128, DEPTH):
                times = profile_bricks(llm, depth=depth)
                rows = [brick.as_dict(ceiling) for brick in times]
                emit({"case": f"profile at depth {depth}", "bricks": rows, "table": profile_table(times, ceiling)})


def arrivals(llm: Any, seed: int, prompt_tokens: int = 512, gen_tokens: int = 32) -> dict[str, Any]:
    """Many prompts arrive at once while a few streams run: their times to the first token, and what the streams get.

    Times are seconds since the arrival. Streams have been running for a while before, and run on behind it.
    """
    import numpy as np

    from engine import SamplingParams

    random = np.random.default_rng(seed)  # nothing of it may be in the prefix cache

    def add(length: int, tokens: int) -> int:
        ids = random.integers(0, llm.model.config.vocab_size, length).tolist()
        return int(llm.add_request(ids, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)))

    streams = {add(128, llm.context_length - 130) for _ in range(RUNNING)}
    stamps: list[float] = []
    first: dict[int, float] = {}
    waiting: set[int] = set()
    arrived = warm = time.perf_counter()
    while True:
        chunks = llm.step()
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.request_id in streams:
                stamps += [now] * len(chunk.token_ids)
            elif chunk.token_ids:
                first.setdefault(chunk.request_id, now)
            if chunk.finish_reason is not None:
                waiting.discard(chunk.request_id)
        if not first and not waiting and len(stamps) >= 200 * RUNNING:
            before = (len(stamps) - 100 * RUNNING) / RUNNING / (stamps[-1] - stamps[100 * RUNNING])
            arrived = time.perf_counter()
            waiting = {add(prompt_tokens, gen_tokens) for _ in range(ARRIVING)}
        elif first and not waiting:
            break
        assert now - warm < 60, "the prompts do not end"
    for stream in streams:
        llm.cancel(stream)
    llm.step()
    last = max(first.values())
    during = [stamp for stamp in stamps if arrived < stamp <= last]
    return {
        "arriving": ARRIVING,
        "running": RUNNING,
        "prompt_tokens": prompt_tokens,
        "first_token_seconds": sorted(value - arrived for value in first.values()),
        "prompt_tok_s": ARRIVING * prompt_tokens / (last - arrived),
        "running_tok_s_before": before,
        "running_tok_s_during": len(during) / RUNNING / (last - arrived),
        "running_longest_gap_seconds": max(b - a for a, b in pairwise(during)),
        "running_token_seconds": [round(stamp - arrived, 5) for stamp in stamps if stamp > arrived - 0.2],
    }


# ---- around it ------------------------------------------------------------------------------------------------------


class Budget:
    """Seconds left of the time limit."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())


def child(
    arguments: list[str], limit: float, environment: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Runs this script with the arguments; returns the JSON lines it wrote and, if it failed, why."""
    if limit < 5:
        return [], "no time left"
    command = [sys.executable, "-m", "scripts.gpu_bench", *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=errors, timeout=limit, env=environment, cwd=ROOT, check=False
            )
            failure = "" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit:.0f} s"
        out.seek(0)
        errors.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{")]
        if failure:
            tail = errors.read()[-1500:].strip()
            print(f"{' '.join(arguments)}: {failure}\n{tail}", file=sys.stderr, flush=True)
            failure += f": {tail.splitlines()[-1]}" if tail else ""
        return lines, failure


def start_times(path: Path, budget: Budget) -> tuple[list[dict[str, Any]], list[str]]:
    """Time to the first token in a fresh process, first with an empty kernel cache, then twice with a full one."""
    results, failures = [], []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm", "warm again"):
            environment = {**os.environ, "GGUF_ENGINE_CACHE": cache, "CUPY_CACHE_DIR": f"{cache}/cupy"}
            arguments = ["--child-start", str(path), "--started", repr(time.time())]
            lines, failure = child(arguments, min(90.0, budget.left), environment)
            results += [{"case": f"start, {name} kernel cache", **line} for line in lines]
            failures += [f"start, {name}: {failure}"] if failure else []
    return results, failures


def command_output(*command: str) -> str:
    """What a command prints, or "" where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def environment_lines() -> dict[str, str]:
    """What the figures depend on."""
    from importlib import metadata

    def version(*names: str) -> str:
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return "missing"

    smi = command_output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    name, driver, memory = (smi.splitlines()[0].split(", ") + ["?"] * 3)[:3] if smi else ("no GPU", "?", "?")
    commit = command_output("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "unknown")
    if command_output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " and changes"
    return {
        "gpu": name,
        "memory": memory,
        "driver": driver,
        "commit": commit,
        "python": sys.version.split()[0],
        "numpy": version("numpy"),
        "cupy": version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "nvrtc": version("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
        "cuda-bindings": version("cuda-bindings"),
    }


def row(model: str, result: dict[str, Any], h200: bool) -> list[str]:
    """One line of the table of speeds."""
    low, high = result["tok_s_range"]
    other = LLAMA_CPP_H200.get((model, result["case"])) if h200 else None
    length = result["gen_tokens"] or result["prompt_tokens"]
    return [
        model,
        f"{result['case']} ({length} tokens, depth {result['depth']}, batch {result['batch']})",
        f"{result['tok_s']:.0f}",
        f"{low:.0f} to {high:.0f}",
        f"{result['gb_s']:.0f}" if result["gb_s"] else "",
        f"{result['percent']:.0f} %" if result["percent"] else "",
        f"{other} ({result['tok_s'] / other:.2f}×)" if other else "",
    ]


def report(
    environment: dict[str, str], models: dict[str, list[dict[str, Any]]], failures: list[str], command: str
) -> str:
    """The report as Markdown."""
    h200 = "H200" in environment["gpu"]
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    lines = [f"# {environment['gpu']}, {date}", "", "; ".join(f"{key} {value}" for key, value in environment.items())]
    ceilings = [one["bandwidth_bytes_s"] for results in models.values() for one in results if one["case"] == "open"]
    if ceilings and ceilings[0]:
        lines.append(f"\nRead bandwidth measured by the engine: {max(ceilings) / 1e9:.0f} GB/s.")
    lines += [f"\nCommand: `{command}`. Method: the head of scripts/gpu_bench.py.", "", "## Speed", ""]
    header = ["model", "case", "tok/s", "range", "GB/s", "of ceiling", "llama.cpp"]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for model, results in models.items():
        lines += ["| " + " | ".join(row(model, one, h200)) + " |" for one in results if "tok_s" in one]
    for model, results in models.items():
        for one in results:
            if one["case"] == "arrivals":
                times = one["first_token_seconds"]
                lines += [
                    "",
                    f"{model}: {one['arriving']} prompts of {one['prompt_tokens']} tokens arrive beside "
                    f"{one['running']} streams. First token after {times[0]:.3f} s (first), "
                    f"{times[len(times) // 2]:.3f} s (median), {times[-1]:.3f} s (last), "
                    f"{one['prompt_tok_s']:.0f} prompt tok/s. Each stream: "
                    f"{one['running_tok_s_before']:.0f} tok/s before, {one['running_tok_s_during']:.0f} meanwhile, "
                    f"longest gap {1e3 * one['running_longest_gap_seconds']:.0f} ms.",
                ]
    lines += [
        "",
        "## Start and memory",
        "",
        "From the start of the Python process; memory beyond the driver's context.",
    ]
    header = [
        "model",
        "kernel cache",
        "to the first token, s",
        "of it opening, s",
        "GPU MB",
        "beside weights and cache, MB",
    ]
    lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for model, results in models.items():
        for one in results:
            if one["case"].startswith("start"):
                cells = [model, one["case"].removeprefix("start, ").removesuffix(" kernel cache")]
                cells += [f"{one['seconds_to_first_token']:.2f}", f"{one['load_seconds']:.2f}"]
                cells += [f"{one['gpu_bytes'] / 1e6:.0f}", f"{one['overhead_bytes'] / 1e6:.0f}"]
                lines.append("| " + " | ".join(cells) + " |")
    for model, results in models.items():
        for one in results:
            if "table" in one:
                lines += ["", f"## {model}, {one['case']}", "", "```", one["table"], "```"]
    if failures:
        lines += ["", "## Not measured", "", *(f"- {failure}" for failure in failures)]
    return "\n".join(lines) + "\n"


def make_file(model: str, folder: Path) -> subprocess.Popen[bytes] | None:
    """Starts writing a model's file; None where it is there already."""
    path = folder / f"{model}.gguf"
    if path.exists():
        return None
    shape, recipe = MODELS[model]
    path = path.resolve()
    partial = path.with_suffix(".part")
    maker = f'"{sys.executable}" -m scripts.make_synthetic_gguf'
    command = f'{maker} {shape} --type {recipe} -o "{partial}" && mv "{partial}" "{path}"'
    return subprocess.Popen(["sh", "-c", command], stderr=subprocess.DEVNULL, cwd=ROOT)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure speed, start-up time and memory on a GPU.")
    parser.add_argument("--models", default=",".join(DEFAULT), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=270, help="seconds for everything")
    parser.add_argument("--dir", type=Path, help="where model files are, or are to be made")
    parser.add_argument("--keep", action="store_true", help="leave the files that were made")
    parser.add_argument("--make-only", action="store_true", help="make the files in --dir and stop")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the report")
    for hidden in ("--child-start", "--child-measure"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.only.split(",")
    if args.child_start:
        print(json.dumps(first_token(args.child_start, args.started)), flush=True)
        return
    if args.child_measure:
        measure(args.child_measure, parts, args.repetitions, lambda one: print(json.dumps(one), flush=True))
        return
    names = args.models.split(",")
    for wanted, known, what in ((names, MODELS, "--models"), (parts, PARTS, "--only")):
        if not set(wanted) <= set(known):
            parser.error(f"{what} {','.join(wanted)}: allowed are {', '.join(known)}")
    run_all(args, names, parts)


def run_all(args: argparse.Namespace, names: list[str], parts: list[str]) -> None:
    """Makes the files, measures every model, writes and prints the report."""
    budget = Budget(args.time_limit)
    with tempfile.TemporaryDirectory(prefix="gguf-bench-") as scratch:
        folder = args.dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        makers = {name: make_file(name, folder) for name in names}
        results: dict[str, list[dict[str, Any]]] = {}
        failures: list[str] = []
        for position, name in enumerate(names):
            path, maker = folder / f"{name}.gguf", makers[name]
            if maker is not None:
                try:
                    maker.wait(timeout=max(1.0, budget.left))
                except subprocess.TimeoutExpired:
                    maker.kill()
            if not path.exists():
                failures.append(f"{name}: its file could not be made in time")
                continue
            if args.make_only:
                continue
            share = Budget(budget.left / (len(names) - position))
            results[name] = []
            cases = [part for part in parts if part != "start"]
            if cases:
                arguments = ["--child-measure", str(path), "--only", ",".join(cases)]
                lines, failure = child([*arguments, "--repetitions", str(args.repetitions)], share.left)
                results[name] += lines
                failures += [f"{name}, after {lines[-1]['case'] if lines else 'nothing'}: {failure}"] if failure else []
            if "start" in parts:
                lines, problems = start_times(path, share)
                results[name] += lines
                failures += [f"{name}, {problem}" for problem in problems]
            if maker is not None and not args.keep:
                path.unlink()
    if args.make_only:
        return
    environment = environment_lines()
    command = "python -m scripts.gpu_bench " + " ".join(sys.argv[1:])
    text = report(environment, results, failures, command)
    slug = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower().removeprefix("nvidia ")).strip("-")
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{slug}"
    for target in filter(None, (args.output, os.environ.get("OUT"))):
        folder = Path(target)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.md").write_text(text, encoding="utf-8")
        everything = {"environment": environment, "command": command, "models": results, "failures": failures}
        (folder / f"{stem}.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    print(text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
