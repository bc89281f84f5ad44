"""Clients that break the rules or leave: every connection ends, nothing is left behind, and others are served."""

import contextlib
import gc
import json
import os
import socket
import struct
import threading
import time

import pytest

from engine import LLM
from engine.serve.http_protocol import Connection
from engine.serve.models.model_store import ModelSpec
from engine.text import Tokenizer
from tests.support.servers.http_server import ENGINE, running

BODY = json.dumps({"prompt": "The", "ignore_eos": True, "max_tokens": 60}).encode()
STREAM = json.dumps({"prompt": "The", "ignore_eos": True, "stream": True}).encode()
ASK = {"ignore_eos": True, "stream": True, "messages": [{"role": "user", "content": "A fox?"}]}
STREAMS = {
    "/v1/completions": STREAM,
    "/completion": STREAM,
    "/v1/chat/completions": json.dumps(ASK).encode(),
    "/v1/messages": json.dumps({**ASK, "max_tokens": 900}).encode(),
    "/v1/responses": json.dumps({"ignore_eos": True, "stream": True, "input": "A fox?"}).encode(),
    "/api/generate": json.dumps({"prompt": "The", "options": {"ignore_eos": True}}).encode(),
}
"""For each endpoint that streams, a request whose answer is long."""


def head(body=BODY, path="/v1/completions", extra=""):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode()


SETTINGS = {"read_timeout": 1.0, "max_body": 1 << 20}


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    yield
    assert not any(server.settle())
    status, _, answer = server.post("/v1/completions", {"prompt": "A", "max_tokens": 2})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


LENGTHY = "a b " * 1500
ASKED = {"messages": [{"role": "user", "content": LENGTHY}], "max_tokens": 1}
TEXTS = {
    "/v1/completions": {"prompt": LENGTHY},
    "/completion": {"prompt": [1, LENGTHY]},
    "/v1/chat/completions": ASKED,
    "/v1/messages": ASKED,
    "/v1/messages/count_tokens": ASKED,
    "/v1/responses": {"input": LENGTHY},
    "/api/generate": {"prompt": LENGTHY},
    "/api/chat": ASKED,
    "/tokenize": {"content": LENGTHY},
    "/v1/embeddings": {"input": LENGTHY},
    "/api/embed": {"input": LENGTHY},
}
"""For each endpoint that cuts texts into tokens, a request with a long one."""


@pytest.mark.parametrize("path", TEXTS)
def test_long_texts_keep_no_other_client_waiting(server, path, monkeypatch):
    """They are cut into tokens in another thread than that of the event loop, which it would stop for seconds."""
    encode, where = Tokenizer.encode, []

    def noted(self, text, **options):
        if LENGTHY in text:
            where.append(threading.current_thread())
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    server.post(path, TEXTS[path])
    assert where
    assert server.thread not in where


def answer_to(server, data):
    """The status of the answer to raw bytes; None where the connection is closed without one."""
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
                if received.count(b"\r\n\r\n") and b"close" not in received.split(b"\r\n\r\n")[0].lower():
                    break
    return int(received[9:12]) if received else None


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET / HTTP/x.y\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 400 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 2_000_000,
    ],
    ids=["tls", "words", "version", "no host", "zero", "negative", "two", "digits", "chunk", "headers", "long"],
)
def test_what_is_no_http_is_refused(server, data):
    assert answer_to(server, data) in (400, 413, None)


def test_ten_thousand_headers_do_not_stop_others(server):
    data = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(10_000)) + b"\r\n"
    assert answer_to(server, data) in (200, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"text"',
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 200_000,
        b'{"prompt": ' * 50_000,
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"temperature": 1e999}',
        b'{"temperature": NaN}',
        b'{"prompt": [' + b"1," * 300_000 + b"1]}",
        b'{"prompt": [99999999999999999999999]}',
        b'{"stop": [' + b'"a",' * 1000 + b'"a"]}',
        b'{"logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(3000)) + b"}}",
    ],
    ids=lambda body: body[:16].decode("latin-1").encode("unicode_escape").decode() + f" {len(body)}",
)
def test_hostile_bodies_get_an_error(server, body):
    for path in (
        "/v1/completions",
        "/completion",
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/api/chat",
    ):
        if not body and path in ("/v1/completions", "/completion"):
            continue  # no text is a text
        status, _, answer = server.post(path, body)
        if path == "/api/chat" and status == 200:  # it knows none of these fields, and nothing was asked
            assert answer["done_reason"] == "load"
            continue
        assert (status in (400, 413), list(answer)[-1]) == (True, "error"), path


def test_half_a_request_ends_in_time(server):
    """Nothing, half a head, a head without its body: each ends within the time that a request has."""
    begun = time.monotonic()
    connections = []
    for data in (b"", b"POST /v1/comp", head()[:-2], head(), head() + BODY[:5]):
        connection = server.connect()
        connection.sendall(data)
        connections.append(connection)
    answers = []
    for connection in connections:
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
        answers.append(received[9:12])
        connection.close()
    assert answers == [b"", b"", b"", b"408", b"408"]
    assert time.monotonic() - begun < 20


def test_single_bytes_do_not_buy_time(server):
    connection = server.connect()
    sent = 0
    with contextlib.suppress(ConnectionError):
        for byte in head() + BODY:
            connection.sendall(bytes([byte]))
            sent += 1
            time.sleep(0.02)
    connection.close()
    assert sent < len(head() + BODY)


def test_wrong_lengths(server):
    long = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + BODY
    assert answer_to(server, long) == 408
    short = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n" + BODY
    assert answer_to(server, short) == 400


PHASES = [0, 5, len(head()) - 1, len(head()), len(head()) + 10, len(head()) + len(BODY)]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("sent", PHASES)
def test_leaving_in_every_phase_of_a_request(server, sent, reset):
    connection = server.connect()
    connection.sendall((head() + BODY)[:sent])
    if sent == PHASES[-1]:
        time.sleep(0.01)
    leave(connection, reset)


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("received", [0, 1, 100, 2000])
def test_leaving_in_every_phase_of_a_stream(server, received, reset, path):
    connection = server.connect()
    connection.sendall(head(STREAMS[path], path) + STREAMS[path])
    while received > 0:
        received -= len(connection.recv(received))
    leave(connection, reset)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_leaving_while_others_have_all_places(server, body, reset):
    """A request that has waited for a place leaves before it gets one."""
    holders, waiting = [server.connect() for _ in range(4)], [server.connect() for _ in range(3)]
    for connection in holders:
        connection.sendall(head(STREAM) + STREAM)
        connection.recv(1)
    for connection in waiting:
        connection.sendall(head(body) + body)
    until(lambda: server.llm.occupancy().waiting == 3)
    for connection in waiting:
        leave(connection, reset)
    until(lambda: server.llm.occupancy().waiting == 0)
    assert len(server.llm.occupancy().slots) == 4
    for connection in holders:
        leave(connection, reset)


@pytest.mark.parametrize("reset", [False, True])
def test_leaving_while_the_model_is_opened(reset):
    """Its opening goes on for others."""
    asked, gate = threading.Event(), threading.Event()

    def slowly(source, **settings):
        asked.set()
        assert gate.wait(60)
        return LLM(source, **settings)

    specs = [ModelSpec(name, None, (), {**ENGINE, "threads": 1}) for name in "ab"]
    with running(specs, open_llm=slowly) as server:
        model = server.serving.store.models[0]
        connection = server.connect()
        connection.sendall(head() + BODY)
        assert asked.wait(60)
        assert model.users == 1
        leave(connection, reset)
        until(lambda: model.users == 0)
        gate.set()
        assert server.post("/v1/completions", {"prompt": "A", "max_tokens": 1})[0] == 200
        assert not any(server.settle())


def until(condition):
    """Wait for it, for a minute at most."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not become true")


def leave(connection, reset):
    if reset:  # the connection is reset instead of closed
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_requests_in_a_row_on_one_connection(server):
    """Pipelined requests are answered in order, the last one also closes."""
    body = json.dumps({"prompt": "A", "max_tokens": 1}).encode()
    data = head(body) + body + head(body) + body + head(body, extra="Connection: close\r\n") + body
    with server.connect() as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200") == 3


LONG = {"ignore_eos": True, "logprobs": 20, "max_tokens": 900}
UNREAD = [
    ("/v1/completions", {"prompt": "The", "stream": True, **LONG}, b"[DONE]"),
    ("/v1/completions", {"prompt": "The", **LONG}, b'"timings"'),
    ("/api/generate", {"prompt": "The", "options": {"ignore_eos": True, "num_predict": 1000}}, b'"done":true'),
]


@pytest.mark.parametrize(("path", "body", "end"), UNREAD, ids=["events", "whole", "lines"])
def test_a_client_that_reads_nothing_holds_no_place(server, monkeypatch, path, body, end):
    """The texts are generated and kept for it; when it takes nothing for too long its connection is closed."""
    lost, connection_lost = threading.Event(), Connection.connection_lost

    def note(one, error):
        connection_lost(one, error)
        if one.client == connection.getsockname():
            lost.set()

    monkeypatch.setattr(Connection, "connection_lost", note)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    with small_send_buffers(server):
        connection.connect(("127.0.0.1", server.port))
    raw = json.dumps(body).encode()
    connection.sendall(head(raw, path) + raw)
    assert lost.wait(60)
    assert not any(server.settle())
    received, piece = b"", b" "
    connection.settimeout(60)
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            received += piece
    connection.close()
    assert received.startswith(b"HTTP/1.1 200")
    assert end not in received


@contextlib.contextmanager
def small_send_buffers(server):
    """Connections made meanwhile have small buffers on the server's side, as on a busy system."""
    one = server.listening
    usual = one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    yield
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual // 2)


def held():
    """File descriptors of the process, and connections that it still knows."""
    gc.collect()
    known = sum(isinstance(one, Connection) for one in gc.get_objects())
    return len(os.listdir("/proc/self/fd")), known


def test_no_descriptors_or_connections_are_left(server):
    time.sleep(0.1)
    before = held()
    for number in range(40):
        connection = server.connect()
        body = STREAM if number % 2 else json.dumps({"prompt": "A", "max_tokens": 1}).encode()
        connection.sendall(head(body) + body)
        connection.recv(
            10
        )  # the rest is not read: closing resets the connection, also one that waits for more requests
        time.sleep(0.05)
        leave(connection, reset=number % 4 < 2)
    assert not any(server.settle())
    for _ in range(1000):  # where other programs want the processors, ends of connections are seen late
        if held() <= before:
            break
        time.sleep(0.02)
    descriptors, known = held()
    assert descriptors <= before[0]
    assert known <= before[1] + 2
