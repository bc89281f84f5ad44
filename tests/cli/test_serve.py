"""The command: what it prints, how it ends, and which models its options name."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from engine.cli.commands.serve import model_specs
from engine.errors import InvalidRequestError
from tests.conftest import ROOT
from tests.support.command_line import run


@pytest.fixture
def start():
    """Start the command on a free port; returns the process, its port and the lines it printed."""
    processes = []

    def start(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve", "--port", "0", "--device", "cpu", "-t", "2", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        printed = [process.stdout.readline() for _ in range(4)]
        port = int(re.search(r"127\.0\.0\.1:(\d+)/v1\n", printed[2])[1])
        return process, port, printed

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_it_prints_its_address_and_drains_at_sigterm(start):
    process, port, printed = start("--log-requests", "--api-key", "k")
    assert printed[0] == "serving tales-Q4_K_M\n"
    assert f"page: http://127.0.0.1:{port}/" in printed[1]
    assert f"curl http://127.0.0.1:{port}/v1/completions" in printed[3]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer k"})
    response = connection.getresponse()
    first = response.readline()
    process.send_signal(signal.SIGTERM)
    assert (first + response.read()).endswith(b"data: [DONE]\n\n")
    connection.close()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    assert "waiting for running requests (1), at most 30 s; Ctrl-C again does not wait\n" in err
    entry = json.loads(err.strip().splitlines()[-1])
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/completions", 200)


@pytest.mark.parametrize("grace", ["30", "1"])
def test_requests_that_are_cut_short_at_the_end_leave_no_traceback(start, grace):
    """By a second Ctrl-C, or because they take longer than their time."""
    process, port, _ = start("--grace", grace)
    body = json.dumps({"prompt": "The", "max_tokens": 1000, "ignore_eos": True, "stream": True})
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(6)]
    for connection in connections:
        connection.request("POST", "/v1/completions", body)
    answers = [connection.getresponse() for connection in connections]
    assert all(answer.readline().startswith(b"data: ") for answer in answers)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("waiting for running requests (6)")
    if grace == "30":
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 1, err
    for connection in connections:
        connection.close()


def test_what_is_shown_while_it_starts_ends_when_it_has_started(monkeypatch):
    events = []

    @contextmanager
    def status(text):
        events.append(text)
        yield
        events.append("started")

    async def serve(serving, sockets, ready, **options):
        ready()
        events.append("serves")
        for one in sockets:
            one.close()

    monkeypatch.setattr("engine.cli.commands.serve.status", status)
    monkeypatch.setattr("engine.serve.server.serve", serve)
    assert "page: " in run("serve", "--port", 0).stdout
    assert events == ["starting ...", "started", "serves"]


def test_ctrl_c_ends_it(start):
    process, _, _ = start()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_other_machines_without_a_key_are_warned_of(start):
    process, _, _ = start("--host", "0.0.0.0")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "WARNING: 0.0.0.0 lets every machine" in err


def test_names_of_models(tmp_path):
    for name in ("one-00001-of-00002", "one-00002-of-00002", "two", "mmproj-two", "deep/three"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.gguf").touch()
    names = [spec.name for spec in model_specs([], [], tmp_path, {})]
    assert names == ["three", "one", "two"]
    first, second = model_specs(["x/a.gguf", "hf:owner/repo:Q8_0"], ["left,l"], None, {})
    assert (first.name, first.aliases, second.name) == ("left", ("l",), "owner/repo:Q8_0")
    assert model_specs([], [], None, {})[0].name == "tales-Q4_K_M"


def test_models_that_cannot_be_told_apart(tmp_path):
    for arguments in (["a/m.gguf", "b/m.gguf"], []), (["m.gguf"], ["a", "b"]), (["m.gguf"], [" ,"]):
        with pytest.raises(InvalidRequestError, match=r"alias|name"):
            model_specs(*arguments, None, {})
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidRequestError, match="models-dir"):
            model_specs([], [], folder, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "7"], "top_p is 7"),
        (["--metrics-style", "other"], "metrics_style is 'other'"),
        (["--max-waiting", "-1"], "max_waiting is -1"),
        (["--grace", "-1"], "grace is -1"),
        (["--deadline", "0"], "deadline is 0"),
        (["--api-key", ""], "an API key is empty"),
        (["-m", "/nowhere/model.gguf", "--port", "0"], "/nowhere/model.gguf"),
    ],
)
def test_errors_are_one_line(arguments, message):
    found = run("serve", *arguments, status=2)
    assert found.stdout == ""
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_only_this_command_loads_the_web_framework():
    code = (
        "import sys; sys.argv[1:] = ['generate', 'A', '-n', '1', '--device', 'cpu']\n"
        "from engine.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "names = ('fastapi', 'uvicorn', 'starlette', 'sse_starlette', 'prometheus_client', 'asyncio')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_port_in_use_is_an_error():
    from engine.serve.server import bind

    taken = bind("127.0.0.1", 0)
    taken[0].listen()
    port = taken[0].getsockname()[1]
    found = run("serve", "--port", port, status=2)
    assert f"127.0.0.1:{port} cannot be used" in found.stderr
    taken[0].close()
    assert threading.active_count() < 50
