"""Keys, limits, deadlines, failed steps, and the server's end."""

import json
import threading
import time

import pytest

from engine.errors import DeviceError
from tests.support.servers.http_server import parse_events, running

ENDLESS = {"prompt": "The", "ignore_eos": True}


def stream_of(server, body=ENDLESS):
    """A socket on which a stream has begun."""
    connection = server.connect()
    raw = json.dumps({**body, "stream": True}).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def rest_of(connection):
    data = b""
    while piece := connection.recv(65536):
        data += piece
    connection.close()
    return data


def test_keys():
    with running(api_keys=("first", "second")) as server:
        body = {"prompt": "A", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}, {"x-api-key": "firs"}):
            status, given, error = server.post("/v1/completions", body, headers=headers)
            assert (status, error["error"]["type"]) == (401, "authentication_error")
            assert given["www-authenticate"] == "Bearer"
        for headers in ({"Authorization": "Bearer first"}, {"authorization": "bearer second"}, {"X-Api-Key": "second"}):
            assert server.post("/v1/completions", body, headers=headers)[0] == 200
        assert server.get("/health")[0] == server.get("/")[0] == 200
        assert server.get("/v1/models")[0] == server.get("/metrics")[0] == server.get("/slots")[0] == 401


@pytest.mark.parametrize("origins", [(), ("http://a.example",)])
def test_other_origins(origins):
    with running(cors_origins=origins) as server:
        asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.request("OPTIONS", "/v1/completions", None, asked)
        allowed = headers["access-control-allow-origin"]
        assert (status, allowed) == ((200, "http://a.example") if origins else (405, None))
        other = {"Origin": "http://b.example"}
        assert server.get("/health", headers=other)[1]["access-control-allow-origin"] is None


def test_every_answer_and_line_of_the_log_has_an_id(capsys):
    with running(log_requests=True, api_keys=("key",)) as server:
        given = [
            server.get("/health", headers={"X-Request-Id": "mine-1"})[1]["x-request-id"],
            server.get("/v1/models", headers={"X-Request-Id": "mine-2"})[1]["x-request-id"],  # refused
            server.get("/health", headers={"X-Request-Id": "x" * 129})[1]["x-request-id"],
            server.get("/health")[1]["x-request-id"],
        ]
    assert given[:2] == ["mine-1", "mine-2"]
    assert len(set(given)) == 4
    assert max(map(len, given)) <= 128
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["request_id"] for line in logged] == given


def test_body_limit():
    with running(max_body=1000) as server:
        assert server.post("/v1/completions", {"prompt": "a" * 2000})[0] == 413
        connection = server.connect()  # without a length, in pieces
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"200\r\n" + b" " * 512 + b"\r\n" + b"200\r\n" + b" " * 512 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"
        connection.close()
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_the_queue_is_bounded():
    with running(max_waiting=0, engine={"max_sequences": 1}) as server:
        connection = stream_of(server)
        status, headers, error = server.post("/v1/completions", {"prompt": "A", "max_tokens": 1})
        assert (status, error["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert server.post("/tokenize", {"content": "A"})[0] == 200
        connection.close()
        assert not any(server.settle())
        assert server.post("/v1/completions", {"prompt": "A", "max_tokens": 1})[0] == 200


def test_deadlines():
    with running(deadline=0.15, engine={"max_sequences": 1}) as server:
        body = {**ENDLESS, "logit_bias": {"5": 1.0}}
        status, _, error = server.post("/v1/completions", {**body, "n": 3})
        assert (status, error["error"]["code"]) == (504, "deadline_exceeded")
        data = rest_of_stream(stream_of(server, {**body, "n": 3, "timeout": 0.1}))
        last = [data for _, data in parse_events(b"\n\n" + data)][-1]
        assert last["error"]["type"] == "timeout_error"
        assert not any(server.settle())


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_ends_its_requests_and_nothing_else(monkeypatch, stream):
    with running() as server:
        failing = threading.Event()
        step = server.llm._runner.step

        def broken(work):
            if failing.is_set():
                failing.clear()
                raise DeviceError("the card is gone")
            return step(work)

        monkeypatch.setattr(server.llm._runner, "step", broken)
        if stream:
            connection = stream_of(server)
            failing.set()
            events = [data for _, data in parse_events(b"\n\n" + rest_of_stream(connection))]
            assert events[-1]["error"]["message"] == "the card is gone"
        else:
            failing.set()
            status, _, error = server.post("/v1/completions", ENDLESS)
            assert (status, error["error"]["code"]) == (500, "device_error")
        status, _, health = server.get("/health")
        assert (status, health["status"]) == (503, "failed")
        assert server.post("/v1/completions", {"prompt": "A", "max_tokens": 1})[0] == 200
        assert server.get("/health")[0] == 200
        assert not any(server.settle())


def rest_of_stream(connection):
    """To the end of a chunked answer."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        assert piece, data[-200:]
        data += piece
    connection.close()
    return data


def test_the_end_lets_running_requests_finish():
    with running(grace=30) as server:
        connection = stream_of(server, {"prompt": "The", "ignore_eos": True, "max_tokens": 300})
        idle = server.connect()
        server.begin_end()
        data = rest_of(connection)
        assert data.rstrip().endswith(b"0")
        assert b"[DONE]" in data
        assert idle.recv(100) == b""
        idle.close()
        server.stop()
        with pytest.raises(OSError, match="refused"):
            server.connect()


def test_the_end_does_not_wait_longer_than_its_grace():
    with running(grace=1) as server:
        step = server.llm._runner.step

        def slow(work):
            time.sleep(0.05)
            return step(work)

        server.llm._runner.step = slow
        connection = stream_of(server)
        server.begin_end()
        data = rest_of(connection)
        assert b"[DONE]" not in data
