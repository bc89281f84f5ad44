"""`gguf-engine serve --ray` in a process of its own, with CPU replicas of the bundled model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

READY_SECONDS = 120
PROCESSES = "ray::ServeReplica:gguf-engine:"
"""Beginning of the titles of the application's processes."""
_REPLICA = PROCESSES + "replica"


@dataclass
class RayServer:
    """A running server: its process and its port."""

    process: subprocess.Popen[str]
    port: int

    def post(self, path: str, timeout: float = 60, headers: dict[str, str] | None = None, **body: object):
        """Status, headers and parsed body of an answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> str:
        """Body of an answer with status 200."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text
        finally:
            connection.close()

    def lines(self, path: str, **body: object) -> Iterator[str]:
        """Lines of a streamed answer as they come; closing the iterator closes the connection."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, json.dumps({**body, "stream": True}))
            answer = connection.getresponse()
            while line := answer.readline():
                if line.strip():
                    yield line.decode().strip()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """Sum of a metric over models and replicas."""
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, values))

    def replicas(self) -> list[int]:
        """Process ids of the replicas that are there."""
        return processes(_REPLICA)

    def busiest_replica(self, seconds: float = 2) -> int:
        """Process id of the replica that computes most in the time to come."""
        before = {pid: _ticks(pid) for pid in self.replicas()}
        time.sleep(seconds)
        return max(before, key=lambda pid: _ticks(pid) - before[pid])

    def processes(self) -> list[int]:
        """Process ids of all that a request goes through."""
        return processes(PROCESSES) + processes("ray::ProxyActor")

    def settle(self) -> tuple[float, float]:
        """Wait until no request is left, at most 20 s; returns how many still run and wait."""

        def left() -> tuple[float, float]:
            return self.metric("vllm:num_requests_running"), self.metric("vllm:num_requests_waiting")

        until = time.monotonic() + 20
        while any(left()) and time.monotonic() < until:
            time.sleep(0.1)
        return left()


def _ticks(pid: int) -> int:
    """Processor time of a process so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def processes(title: str) -> list[int]:
    """Process ids of the processes whose title begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            pass
    return found


def wait_for(condition, seconds: float = 60) -> None:
    """Until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that in time"
        time.sleep(0.1)


@contextmanager
def running(*options: str) -> Iterator[RayServer]:
    """A server with such options; ended by Ctrl-C, with status 0 and without leaving processes."""
    command = [sys.executable, "-m", "engine", "serve", "--ray", "--port", "0", "--threads", "1", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        timer = threading.Timer(READY_SECONDS, process.kill)
        timer.start()
        told: list[str] = []
        assert process.stderr is not None
        reading = threading.Thread(target=told.extend, args=(process.stderr,), daemon=True)
        reading.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"API: +http://127.0.0.1:(\d+)", line):
                    break
            else:
                raise AssertionError("the server did not start: " + "".join(told))
            timer.cancel()
            yield RayServer(process, int(found[1]))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, "".join(told)
            wait_for(lambda: not processes(PROCESSES), 20)
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                for number in processes("ray::"):
                    os.kill(number, signal.SIGKILL)
            reading.join()
