"""Send a server thousands of requests, many of which leave, run out of time or meet injected faults.

    python -m scripts.soak_serve [--requests 10000] [--clients 64] [--model FILE] [--replicas 2]

Runs the server in this process; with --replicas as `serve --ray`, and without faults. Every request must be answered or
closed; at the end no request, page or user of the model may be left, and memory and file descriptors must be what they
were after the first tenth. Prints the counts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import DeviceError

MEMORY_NOISE = 64 << 20
"""Bytes by which the memory of processes may differ without anything being kept."""


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        requests: in all.
        clients: threads that send them.
        seed: of all choices.
        failures: steps that fail.
    """

    requests: int = 10_000
    clients: int = 64
    seed: int = 0
    failures: int = 200


def soak(server: Any, load: Load) -> Counter[str]:
    """Send the load to a server of tests/support/servers/: http_server.py, or without failures ray_server.py.

    Returns:
        How many requests were "completed", "left" by their clients, too "late" or "failed"; and how often one found the
        queue "full" and was sent again.
    """
    counts: Counter[str] = Counter()
    numbers = iter(range(load.requests))
    lock, errors = threading.Lock(), list[BaseException]()
    if load.failures:
        _fail_some_steps(server.llm, load)

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ended = "full"
            while ended == "full":
                try:
                    ended = _request(server.port, random.Random(f"{load.seed} {number}"))
                except BaseException as error:
                    errors.append(error)
                    return
                with lock:
                    counts[ended] += 1
                if ended == "full":
                    time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return counts


def _fail_some_steps(llm: Any, load: Load) -> None:
    """Let some of the steps raise, as a device may."""
    runner, step = llm._runner, llm._runner.step
    dice, left = random.Random(load.seed), load.failures

    def sometimes(work: Any) -> Any:
        nonlocal left
        if left and dice.random() < 0.02:
            left -= 1
            raise DeviceError("an injected fault")
        return step(work)

    runner.step = sometimes


def _request(port: int, dice: random.Random) -> str:
    """One request of a random kind; how it ended."""
    body: dict[str, Any] = {
        "prompt": [dice.randrange(1, 4000) for _ in range(dice.choice((1, 5, 40, 150)))],
        "max_tokens": dice.choice((1, 4, 16, 60)),
        "ignore_eos": True,
        "stream": dice.random() < 0.6,
        "n": dice.choice((1, 1, 1, 2)),
    }
    if dice.random() < 0.3:  # prompts that begin alike share pages
        body["prompt"] = [7] * 130 + body["prompt"]
    if dice.random() < 0.1:
        body["timeout"] = dice.choice((0.001, 0.01, 0.05))
    leaves = dice.random() < 0.2
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body))
        if leaves:
            if dice.random() < 0.5:
                connection.sock.settimeout(dice.random() * 0.05)
                with suppress(TimeoutError):
                    connection.sock.recv(dice.choice((1, 200)))
            return "left"
        response = connection.getresponse()
        data = response.read()
        return _ending(response.status, data, body["stream"])
    finally:
        if connection.sock is not None and dice.random() < 0.5:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()


def _ending(status: int, data: bytes, stream: bool) -> str:
    if status == 200 and (data.endswith(b"data: [DONE]\n\n") if stream else b'"usage"' in data):
        return "completed"
    if status == 429:
        return "full"
    if status == 504 or (stream and b'"deadline_exceeded"' in data):
        return "late"
    if status == 500 or (stream and b"an injected fault" in data):
        return "failed"
    raise AssertionError(f"status {status}: {data[-300:]!r}")


@dataclass(frozen=True)
class Held:
    """What some processes hold together.

    Attributes:
        descriptors: open files and sockets.
        resident: bytes of memory.
    """

    descriptors: int
    resident: int


@dataclass(frozen=True)
class Outcome:
    """What came of a load in two parts.

    Attributes:
        requests: that were sent.
        counts: see soak().
        left: what settle() of the server found at the end, all 0 where nothing is left behind.
        first: what the processes held after the first part.
        last: and after the second.
    """

    requests: int
    counts: Counter[str]
    left: tuple[float, ...]
    first: Held
    last: Held

    @property
    def lost(self) -> int:
        """Requests of which nothing was heard."""
        return self.requests - (self.counts.total() - self.counts["full"])

    @property
    def flat(self) -> bool:
        """Whether the second part made the processes hold no more, but for noise."""
        more = self.last.resident - self.first.resident
        return self.last.descriptors <= self.first.descriptors + 2 and more < MEMORY_NOISE


def soak_in_parts(server: Any, load: Load, processes: Callable[[], Sequence[int]], *, first: float = 0.1) -> Outcome:
    """Send a load in two parts and compare what processes hold after each.

    Args:
        server: see soak(); settle() waits for its requests to end and says what is left.
        load: whose failures come in the same proportion in both parts.
        processes: ids of those that may keep something.
        first: share of the first part, whose prompts must fill the caches once.
    """
    counts, held, left = Counter[str](), list[Held](), tuple[float, ...]()
    n_first = int(load.requests * first)
    for seed, n in enumerate((n_first, load.requests - n_first)):
        part = replace(load, requests=n, seed=2 * load.seed + seed, failures=load.failures * n // load.requests)
        counts += soak(server, part)
        left = server.settle()
        time.sleep(1)
        held.append(_held(processes()))
        print(f"{n} requests, left behind {left}, {held[-1]}", flush=True)
        if any(left):
            break
    return Outcome(load.requests, counts, left, held[0], held[-1])


def _held(processes: Sequence[int]) -> Held:
    descriptors = sum(len(os.listdir(f"/proc/{one}/fd")) for one in processes)
    pages = sum(int(Path(f"/proc/{one}/statm").read_text(encoding="ascii").split()[1]) for one in processes)
    return Held(descriptors, pages * resource.getpagesize())


def main() -> int:
    """Run the soak and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", help="a GGUF file; the bundled model by default")
    parser.add_argument("--replicas", type=int, help="of `serve --ray`, in place of a server in this process")
    arguments = parser.parse_args()
    load = Load(arguments.requests, arguments.clients, failures=0 if arguments.replicas else arguments.requests // 50)
    begun = time.monotonic()
    outcome = (_soak_replicas if arguments.replicas else _soak_here)(arguments, load)
    print(f"{dict(outcome.counts)}, {outcome.lost} lost, {time.monotonic() - begun:.0f} s")
    more = outcome.last.resident - outcome.first.resident
    print(f"memory grew by {more / 2**20:.0f} MiB:", "flat" if outcome.flat else "NOT flat")
    return 0 if outcome.flat and not outcome.lost and not any(outcome.left) else 1


def _soak_here(arguments: argparse.Namespace, load: Load) -> Outcome:
    from engine.serve.models.model_store import ModelSpec
    from tests.support.servers.http_server import running

    spec = ModelSpec("soak", arguments.model, (), {"device": "auto", "max_sequences": 8, "cache_tokens": 4096})
    with running([spec], max_waiting=load.clients // 2) as server:
        return soak_in_parts(server, load, lambda: [os.getpid()])


def _soak_replicas(arguments: argparse.Namespace, load: Load) -> Outcome:
    from tests.support.servers.ray_server import running

    model = ["--model", arguments.model] if arguments.model else []
    limits = ["--max-sequences", "8", "--cache-tokens", "4096", "--max-waiting", str(load.clients // 2)]
    with running("--replicas", str(arguments.replicas), *limits, *model) as server:
        return soak_in_parts(server, load, server.processes)


if __name__ == "__main__":
    sys.exit(main())
