"""Measure servers under load: tokens per second and time to the first token for 1, 4, 16 and 64 clients.

    python -m scripts.bench_serve -m model.gguf [--peer llama-server] [--in-process] [--json FILE] [--plot FILE]

Starts `gguf-engine serve`, and with --peer a llama-server on the same file; --url measures a server that runs already.
Every client streams /v1/completions with a prompt of its own and a fixed number of tokens. The servers take turns, so
that they see the same machine; a figure is the median of the rounds, with the best round beside it. --in-process adds
the rate of LLM.generate with as many prompts, on the same file and device, for comparison with what HTTP costs. Leave
the machine to it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from engine import LLM, SamplingParams

READY_SECONDS = 600
T = TypeVar("T")
Round = tuple[float, list[float]]
"""Tokens per second of all clients together, and the seconds to the first token of each."""


@dataclass(frozen=True)
class Figure:
    """What one server did for one number of clients.

    Attributes:
        name: of the server.
        clients: side by side.
        tokens_s: generated tokens per second of all clients together.
        first_ms: milliseconds to the first token, median over clients.
        first_worst_ms: the same of the slowest client.
        spread: largest rate of a round less the smallest, as part of the median.
        best_tokens_s: rate of the best round: what the machine allows when other programs leave it alone.
        best_first_ms: least milliseconds to the first token, of the median client of a round.
    """

    name: str
    clients: int
    tokens_s: float
    first_ms: float
    first_worst_ms: float
    spread: float
    best_tokens_s: float
    best_first_ms: float


class Neighbours:
    """Other programs of this machine, which a measurement must not count (Linux).

    Attributes:
        own: ids of the processes that are measured or measure.
    """

    def __init__(self) -> None:
        self.own = ["self"]

    def spared(self, run: Callable[[], T], most: float) -> T:
        """What run() gives; again until others used no more than this part of the processors meanwhile."""
        while most < 1:
            before = self.now()
            time.sleep(2)
            if self.part(before) < most:
                before = self.now()
                found = run()
                if self.part(before) <= most:
                    return found
        return run()

    def part(self, before: tuple[int, int]) -> float:
        """Which part of the processors' time they have used since `before`, an earlier value of now()."""
        every, used = (now - then for now, then in zip(self.now(), before, strict=True))
        return used / max(every, 1)

    def now(self) -> tuple[int, int]:
        """Ticks of all processors so far, and those that others have used."""
        line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
        ticks = [int(word) for word in line.split()[1:9]]  # user nice system idle iowait irq softirq steal
        own = 0
        for one in self.own:
            fields = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4] - own


@contextmanager
def started(command: Sequence[str], port: int, neighbours: Neighbours) -> Iterator[str]:
    """A server process, ready; its address."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    neighbours.own.append(str(process.pid))
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + READY_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command[0]} did not become ready")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        neighbours.own.remove(str(process.pid))
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def stream(url: str, prompt: list[int], n: int, told: Callable[[float], None]) -> None:
    """One request; tells the seconds to its first token."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port, timeout=READY_SECONDS)
    body = {"prompt": prompt, "max_tokens": n, "ignore_eos": True, "stream": True, "temperature": 0.0, "seed": 1}
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{url} answered {response.status}: {response.read()[:500]!r}")
    first = False
    for line in response:
        if not first and line.startswith(b"data: {"):
            first = True
            told(time.perf_counter() - begun)
    connection.close()


def measure(url: str, prompts: Sequence[list[int]], n: int) -> Round:
    """Tokens per second of as many clients as there are prompts, and their seconds to the first token."""
    firsts: list[float] = []
    threads = [threading.Thread(target=stream, args=(url, prompt, n, firsts.append)) for prompt in prompts]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(prompts) * n / (time.perf_counter() - begun), firsts


def prompts_for(clients: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that share nothing, of token ids that every vocabulary has."""
    dice = random.Random(f"{seed} {clients}")
    return [[dice.randrange(300, 3000) for _ in range(length)] for _ in range(clients)]


def in_process(llm: LLM, prompts: Sequence[list[int]], n: int) -> Round:
    """The same without HTTP; there is no time to the first token, as generate() returns at the end."""
    begun = time.perf_counter()
    llm.generate(list(prompts), SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))
    return len(prompts) * n / (time.perf_counter() - begun), [0.0]


def compare(
    servers: dict[str, Callable[..., Round]],
    arguments: argparse.Namespace,
    neighbours: Neighbours,
) -> list[Figure]:
    """Figures of all servers, taken in turns."""
    figures = []
    for clients in arguments.clients:
        rates: dict[str, list[float]] = {name: [] for name in servers}
        firsts: dict[str, list[list[float]]] = {name: [] for name in servers}
        for number in range(arguments.rounds + 1):  # the first one warms up
            for name, run in servers.items():
                prompts = prompts_for(clients, arguments.prompt, number)
                once = partial(run, prompts, arguments.tokens)
                rate, seconds = neighbours.spared(once, arguments.quiet) if number else once()
                if number:
                    rates[name].append(rate)
                    firsts[name].append(seconds)
        for name in servers:
            figures.append(figure(name, clients, rates[name], firsts[name]))
            one = asdict(figures[-1])
            print(
                "{name:12} {clients:4} clients {tokens_s:9.1f} tok/s, best {best_tokens_s:9.1f}".format(**one), end=""
            )
            print("   first {first_ms:8.1f} ms, best {best_first_ms:8.1f}, ".format(**one), end="")
            print("worst {first_worst_ms:8.1f}   spread {spread:.0%}".format(**one), flush=True)
    return figures


def figure(name: str, clients: int, rates: Sequence[float], firsts: Sequence[Sequence[float]]) -> Figure:
    """What the rounds of one server say.

    Args:
        name: of the server.
        clients: side by side.
        rates: tokens per second of each round.
        firsts: for each round, each client's seconds to the first token.
    """
    middle, every = statistics.median(rates), [seconds for one in firsts for seconds in one]
    return Figure(
        name,
        clients,
        tokens_s=middle,
        first_ms=statistics.median(every) * 1000,
        first_worst_ms=max(every) * 1000,
        spread=(max(rates) - min(rates)) / middle,
        best_tokens_s=max(rates),
        best_first_ms=min(statistics.median(one) for one in firsts) * 1000,
    )


def plot(figures: Sequence[Figure]) -> str:
    """Bars of tokens per second by clients, one colour for each server, as SVG."""
    names, groups = (
        list(dict.fromkeys(one.name for one in figures)),
        list(dict.fromkeys(one.clients for one in figures)),
    )
    colours, high = ("#2f6db3", "#c8793a", "#6b6a66"), max(one.tokens_s for one in figures)
    bar, height, left = 34, 220, 60
    width = left + len(groups) * (len(names) * bar + 30)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 90}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#fcfcfb"/>',
    ]
    for index, name in enumerate(names):
        out.append(f'<rect x="{left + index * 140}" y="14" width="12" height="12" fill="{colours[index % 3]}"/>')
        out.append(f'<text x="{left + 18 + index * 140}" y="25" font-size="13">{name}</text>')
    for one in figures:
        group, index = groups.index(one.clients), names.index(one.name)
        x = left + group * (len(names) * bar + 30) + index * bar
        tall = height * one.tokens_s / high
        y = 50 + height - tall
        colour = colours[index % 3]
        out.append(f'<rect x="{x}" y="{y:.1f}" width="{bar - 4}" height="{tall:.1f}" fill="{colour}"/>')
        out.append(f'<text x="{x}" y="{y - 4:.1f}" font-size="10">{one.tokens_s:.0f}</text>')
        if index == 0:
            out.append(f'<text x="{x}" y="{height + 70}" font-size="12">{one.clients} clients</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    """Start the servers, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model", help="a GGUF file; the bundled model by default")
    parser.add_argument("--peer", help="path of a llama-server")
    parser.add_argument("--url", action="append", default=[], help="NAME=http://host:port of a server that runs")
    parser.add_argument("--in-process", action="store_true", help="also LLM.generate, without HTTP")
    parser.add_argument("--clients", type=lambda text: [int(one) for one in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quiet",
        type=float,
        default=1.0,
        help="repeat a run in which other programs used more than this part of the processors' time",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of both servers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="write an SVG there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    from engine.api.llm import BUNDLED_MODEL

    model, most = arguments.model or str(BUNDLED_MODEL), max(arguments.clients)
    context = 64 * (1 + (arguments.prompt + arguments.tokens) // 64)
    servers: dict[str, Callable[..., Round]] = {}
    neighbours = Neighbours()
    with ExitStack() as stack:
        for given in arguments.url:
            name, _, url = given.partition("=")
            servers[name] = lambda prompts, n, url=url: measure(url, prompts, n)
        if not arguments.url:
            port = free_port()
            command = [sys.executable, "-m", "engine", "serve", "-m", model, "--port", str(port)]
            command += ["-c", str(context), "--cache-tokens", str(context * most), "--max-sequences", str(most)]
            command += ["--device", arguments.device]
            command += ["--threads", str(arguments.threads)] if arguments.threads else []
            url = stack.enter_context(started(command, port, neighbours))
            servers["gguf-engine"] = lambda prompts, n, url=url: measure(url, prompts, n)
        if arguments.peer:
            port = free_port()
            command = [arguments.peer, "-m", model, "--port", str(port), "-np", str(most)]
            command += ["-c", str(context * most)]
            command += ["-t", str(arguments.threads)] if arguments.threads else []
            url = stack.enter_context(started(command, port, neighbours))
            servers["llama-server"] = lambda prompts, n, url=url: measure(url, prompts, n)
        if arguments.in_process:
            room = {"context_length": context, "cache_tokens": context * most, "max_sequences": most}
            llm = stack.enter_context(LLM(model, arguments.device, threads=arguments.threads, **room))
            servers["in process"] = lambda prompts, n: in_process(llm, prompts, n)
        figures = compare(servers, arguments, neighbours)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in figures], indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(plot(figures))


if __name__ == "__main__":
    main()
