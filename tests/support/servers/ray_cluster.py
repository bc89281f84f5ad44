"""A Ray cluster of this machine as `ray start` makes one, to which `serve deploy` brings applications."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any
from urllib.request import Request, urlopen

from tests.support.servers.ray_server import PROCESSES, READY_SECONDS, RayServer, processes, wait_for

BIN = Path(sysconfig.get_path("scripts"))
TOKEN = "0123456789abcdef" * 4


@dataclass
class RayCluster:
    """A running cluster.

    Attributes:
        process: `ray start`, which ends all others with itself.
        folder: for its files.
        environment: of all commands.
        dashboard: port that `serve` talks to.
        http: port that the application listens on.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str]
    dashboard: int
    http: int = field(default_factory=lambda: _free_ports(1)[0])

    def deploy(self, **arguments: Any) -> None:
        """`serve deploy` of a configuration file with such arguments of the application."""
        application = {
            "name": "gguf-engine",
            "import_path": "engine.cluster.application:build",
            "route_prefix": "/",
            "args": arguments,
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.http},
            "applications": [application],
        }
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = [str(BIN / "serve"), "deploy", str(path), "--address", f"http://127.0.0.1:{self.dashboard}"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait_until(self, status: str, seconds: float) -> None:
        """Until Ray says this of the application; RUNNING: it has all its replicas as they were deployed last."""
        wait_for(lambda: self._status() == status, seconds)

    def _status(self) -> str:
        url = f"http://127.0.0.1:{self.dashboard}/api/serve/applications/"
        with urlopen(Request(url, headers={"Authorization": f"Bearer {TOKEN}"}), timeout=30) as answer:
            return json.load(answer)["applications"]["gguf-engine"]["status"]

    def server(self) -> RayServer:
        """What answers there."""
        return RayServer(self.process, self.http)


@contextmanager
def ray_cluster(folder: Path, *, cpus: int) -> Iterator[RayCluster]:
    """A cluster of one node, as the first machine of several; ended without leaving processes.

    Args:
        folder: for its files; short, as paths of sockets have at most 107 bytes.
        cpus: that it says it has.
    """
    ports = _free_ports(4)
    names = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")
    options = [word for pair in zip(names, map(str, ports), strict=True) for word in pair]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", str(cpus)]
    command += ["--node-ip-address", "127.0.0.1", "--temp-dir", str(folder)]
    environment = {
        **os.environ,
        "HOME": str(folder),  # the token of a user who has one stays out of it
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
    try:
        cluster = RayCluster(process, folder, environment, ports[1])
        wait_for(lambda: _started(cluster), READY_SECONDS)
        yield cluster
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        wait_for(lambda: not processes(PROCESSES), 30)


def _started(cluster: RayCluster) -> bool:
    told = (cluster.folder / "start.log").read_text(errors="replace")
    assert cluster.process.poll() is None, told
    return "Ray runtime started" in told


def _free_ports(n: int) -> list[int]:
    sockets = [socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found
