"""Send a server thousands of requests, many of which leave, run out of time or meet injected faults.

    python -m scripts.soak_serve [--requests 10000] [--clients 64] [--model FILE]

Runs the server in this process. Every request must be answered or closed; at the end no request, page or user of the
model may be left, and memory and file descriptors must be what they were after the first tenth. Prints the counts.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DeviceError


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
    """Send the load to a running server (tests.support.http_server).

    Returns:
        How many requests were "completed", "left" by their clients, too "late" or "failed"; and how often one found the
        queue "full" and was sent again.
    """
    counts: Counter[str] = Counter()
    numbers = iter(range(load.requests))
    lock, errors = threading.Lock(), list[BaseException]()
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


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident() -> int:
    """Bytes of memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    """Run the soak in two parts and compare what the process holds after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", help="a GGUF file; the bundled model by default")
    arguments = parser.parse_args()
    from engine.serve.model_store import ModelSpec
    from tests.support.http_server import running

    spec = ModelSpec("soak", arguments.model, (), {"device": "auto", "max_sequences": 8, "cache_tokens": 4096})
    counts: Counter[str] = Counter()
    held: list[tuple[int, int]] = []
    begun = time.monotonic()
    with running([spec], max_waiting=arguments.clients // 2) as server:
        for seed, share in enumerate((0.1, 0.9)):
            n = int(arguments.requests * share)
            counts += soak(server, Load(n, arguments.clients, seed, failures=n // 50))
            left = server.settle()
            time.sleep(1)
            held.append((_descriptors(), _resident()))
            print(f"{n} requests, left behind {left}, {held[-1][0]} descriptors, {held[-1][1] >> 20} MiB", flush=True)
            if any(left):
                return 1
    print(dict(counts), f"{time.monotonic() - begun:.0f} s")
    grown = held[1][1] - held[0][1]
    flat = held[1][0] <= held[0][0] + 2 and grown < (64 << 20)
    print(f"memory grew by {grown >> 20} MiB:", "flat" if flat else "NOT flat")
    return (
        0
        if flat and sum(counts.values()) - counts["full"] == sum(int(arguments.requests * one) for one in (0.1, 0.9))
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
