"""Speed on the CPU beside llama.cpp's and ik_llama.cpp's, for the same files, on the same machine, in turns.

    python -m scripts.bench_cpu_peer model.gguf ... --peer-python /path/to/venv/bin/python

`--peer-python` is an interpreter that has llama-cpp-python installed (`CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python` builds it for the machine at hand). With `--llama-bench [NAME=]COMMAND`, which may be given again, the
peers are those programs of llama.cpp or of ik_llama.cpp instead, which open the model anew for each run; for example
`--llama-bench "ik, repacked=/path/to/llama-bench -rtr 1"`. Ratios are to the fastest peer. Otherwise each program has a
process of its own that keeps the model open; they run by turns, never at the same time, with the same number of
threads. A prompt is timed from its first token to the logits of its last; decoding through each program's own step, the
likeliest token fed back.
Decoding also shows the share of the machine's read bandwidth, measured after each run, that weights and cache were read
with. On a machine shared with others that bandwidth varies more than anything else here. Prints markdown.

A run whose threads had to wait for a processor for more than a twentieth of its time is thrown away and made again
(where /proc says so): a program whose threads wait for each other loses far more by it than one whose threads do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.3
"""Seconds between two runs: threads of the one that ended may still be spinning."""

CALM = 0.05
"""Share of a run that its threads may wait for a processor."""

ATTEMPTS = 20
"""Runs per counted one before a disturbed one is taken as well."""


# -- one process per program: a line of JSON in, a line of JSON out ----------------------------------------------------


def serve_engine(model: str, threads: int, context: int, options: dict[str, Any]) -> None:
    """Answer requests with this engine."""
    from engine import LLM, __version__
    from engine.api.bench import run_bench

    with LLM(model, device="cpu", threads=threads, context_length=context, max_sequences=1, **options) as llm:

        def measure(prompt: int, generated: int, depth: int) -> list[float]:
            result = run_bench(llm, prompt_tokens=prompt, gen_tokens=generated, depth=depth, repetitions=1)
            speed = result.prompt or result.decode
            ceiling = llm.read_bandwidth()
            assert speed is not None
            assert ceiling is not None, "the CPU measures its read bandwidth"
            return [speed.median, result.decode_bytes_s or 0.0, ceiling]

        answer(__version__)
        listen(measure)


def serve_peer(model: str, threads: int, context: int, options: dict[str, Any]) -> None:
    """Answer requests with llama.cpp; `options` are the other's."""
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(
        model, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, n_gpu_layers=0
    )
    context_pointer, n_vocab = llm.ctx, llm.n_vocab()
    random = np.random.default_rng(0)

    def feed(tokens: list[int]) -> int:
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            ids = (llama_cpp.llama_token * len(part))(*part)  # the batch only points to it
            batch = llama_cpp.llama_batch_get_one(ids, len(part))
            if llama_cpp.llama_decode(context_pointer, batch):
                raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context_pointer, -1)
        return int(np.ctypeslib.as_array(logits, shape=(n_vocab,)).argmax())

    def measure(prompt: int, generated: int, depth: int) -> list[float]:
        for _ in range(2):  # the first is not counted, as in the other program
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context_pointer), True)
            tokens = random.integers(0, n_vocab, max(depth, 0 if prompt else 1) + prompt).tolist()
            before = tokens[: len(tokens) - prompt]
            token = feed(before) if before else 0
            begin = time.perf_counter()
            if prompt:
                feed(tokens[len(before) :])
            else:
                for _ in range(generated):
                    token = feed([token])
            seconds = time.perf_counter() - begin
        return [(prompt or generated) / seconds]

    answer(f"llama-cpp-python {llama_cpp.__version__}")
    listen(measure)


def answer(value: Any) -> None:
    """One line to the program that asked."""
    print(json.dumps(value), flush=True)


def listen(measure: Any) -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        answer(measure(**json.loads(line)))


# -- the program that asks ---------------------------------------------------------------------------------------------


class Program:
    """A process with the model open."""

    def __init__(self, python: str, role: str, settings: dict[str, Any]) -> None:
        self._command = [python, "-m", "scripts.bench_cpu_peer", "--serve", role, json.dumps(settings)]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.greeting = self._read()
        self.disturbed = 0

    def ask(self, **request: int) -> list[float]:
        """One run in calm: tokens per second; of this engine also bytes read per second, and the machine's most."""
        assert self._process.stdin is not None
        for _ in range(ATTEMPTS):
            time.sleep(PAUSE)
            before = waited(self._process.pid)
            start = time.perf_counter()
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            result: list[float] = self._read()
            seconds = time.perf_counter() - start
            if waited(self._process.pid) - before <= CALM * seconds:
                return result
            self.disturbed += 1
        note("never calm: a disturbed run is counted")
        return result

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._command)} ended early")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class LlamaBench:
    """A program llama-bench as a peer: opens the model, warms up and measures once for each run."""

    disturbed = 0

    def __init__(self, command: str, model: Path, threads: int) -> None:
        name, equals, rest = command.partition("=")
        self.greeting = name if equals else "llama.cpp"
        program = shlex.split(rest if equals else command)
        said = subprocess.run([program[0], "--help"], capture_output=True, text=True, check=False)
        self._has_depth = "--n-depth" in said.stdout + said.stderr
        self._command = [*program, "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]

    def ask(self, *, prompt: int, generated: int, depth: int) -> list[float]:
        """One run: tokens per second; 0 where the program cannot open the model."""
        time.sleep(PAUSE)
        work = ["-p", str(prompt), "-n", str(generated), *(("-d", str(depth)) if depth else ())]
        if depth and not self._has_depth:  # ik_llama.cpp's: generated tokens behind a prompt
            work = ["-p", "0", "-n", "0", "-gp", f"{depth},{generated}"]
        done = subprocess.run([*self._command, *work], capture_output=True, text=True, check=False)
        if done.returncode:
            note(f"{self.greeting} failed: {done.stderr.strip().splitlines()[-1:]}")
            return [0.0]
        return [float(json.loads(done.stdout)[0]["avg_ts"])]

    def close(self) -> None:
        """Nothing stays open."""


def waited(pid: int) -> float:
    """Seconds that a process's threads were ready to run and did not, added up; 0 where the system does not say."""
    times = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(delay) for _, delay, _ in times) / 1e9


@dataclass(frozen=True)
class Found:
    """What the programs did for one request, tokens per second of each run."""

    what: str
    mine: list[float]
    peers: dict[str, list[float]]  # by name
    bandwidth: float  # share of the machine's read bandwidth that this engine's decoding had; 0 for prompts

    @property
    def ratio(self) -> float:
        """This engine's median over the fastest peer's."""
        return median(self.mine) / max(median(speeds) for speeds in self.peers.values())

    def row(self, name: str) -> str:
        """A row of the table."""
        every = (self.mine, *self.peers.values())
        spread = ", ".join(f"{min(speeds):.1f}-{max(speeds):.1f}" for speeds in every)
        columns = (name, self.what, *(f"{median(speeds):.1f}" for speeds in every), f"{self.ratio:.2f}", spread)
        return f"| {' | '.join(columns)} | {f'{self.bandwidth:.0%}' if self.bandwidth else ''} |"


def compare(model: Path, args: argparse.Namespace) -> Iterator[Found]:
    """Run all programs by turns on one file: all requests of the arguments, in order."""
    requests = [(f"prompt of {length}", {"prompt": length, "generated": 0, "depth": 0}) for length in args.prompt]
    requests += [
        (f"decode at depth {depth}", {"prompt": 0, "generated": args.generate, "depth": depth}) for depth in args.depth
    ]
    longest = max(*args.prompt, args.generate + max(args.depth)) + 16
    settings = {"model": str(model), "threads": args.threads, "context": longest, "options": {}}
    ours = Program(sys.executable, "engine", settings | {"options": json.loads(args.options)})
    peers: list[Program] | list[LlamaBench]
    if args.llama_bench:
        peers = [LlamaBench(command, model, args.threads) for command in args.llama_bench]
    else:
        peers = [Program(args.peer_python, "peer", settings)]
    programs = (ours, *peers)
    note(f"{model.name}: {ours.greeting} beside {', '.join(peer.greeting for peer in peers)}")
    for what, request in requests:
        runs: list[list[list[float]]] = [[] for _ in programs]
        for _ in range(args.repetitions):
            for program, found in zip(programs, runs, strict=True):
                found.append(program.ask(**request))
        mine, *others = ([run[0] for run in found] for found in runs)
        by_name = dict(zip((peer.greeting for peer in peers), others, strict=True))
        result = Found(what, mine, by_name, median(run[1] / run[2] for run in runs[0]))
        note(result.row(model.name))
        yield result
    note(f"{sum(program.disturbed for program in programs)} disturbed runs thrown away")
    for program in programs:
        program.close()


def note(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Read the arguments; serve, or compare."""
    if sys.argv[1:2] == ["--serve"]:
        role, settings = sys.argv[2], json.loads(sys.argv[3])
        {"engine": serve_engine, "peer": serve_peer}[role](**settings)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    add_options(parser)
    args = parser.parse_args()
    found = [(model.name, result) for model in args.models for result in compare(model, args)]
    print(f"{platform.machine()}, {args.threads} threads, median of {args.repetitions} alternating runs, tokens/s\n")
    columns = ("file", "what", "gguf-engine", *found[0][1].peers, "ratio", "ranges", "bandwidth")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    print("\n".join(result.row(name) for name, result in found))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What compare() reads besides the file."""
    peers = parser.add_mutually_exclusive_group(required=True)
    peers.add_argument("--peer-python", help="interpreter that has llama-cpp-python")
    peers.add_argument(
        "--llama-bench", action="append", help="[NAME=]COMMAND of a program llama-bench; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512], help="prompt lengths")
    parser.add_argument("--generate", type=int, default=64, help="tokens decoded")
    parser.add_argument("--depth", type=int, nargs="+", default=[0], help="tokens in the cache before decoding")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--options", default="{}", help='more settings of LLM() as JSON, e.g. {"exact": true}')


if __name__ == "__main__":
    main()
