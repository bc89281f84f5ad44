"""Several models behind one server: opened on first use, closed for others or when idle, never in use."""

import json
import threading
import time

import pytest

from engine import LLM
from engine.errors import DeviceError, EngineError, ModelFileError
from engine.serve.models import model_store
from engine.serve.models.model_store import ModelSpec
from engine.serve.routes.models import health_of
from engine.serve.serving import Serving
from engine.serve.settings import ServeSettings
from tests.support.servers.http_server import ENGINE, running

SMALL = {**ENGINE, "threads": 1, "max_sequences": 1}
NAMES = ("a", "b", "c")
ASK = {"prompt": "A", "max_tokens": 1}


def specs(names=NAMES):
    return [ModelSpec(name, None, (f"{name}-alias",), SMALL) for name in names]


class Opener:
    """Opens models and keeps count; fails or waits on request."""

    def __init__(self):
        self.opened = 0
        self.failures = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, source, **settings):
        self.gate.wait(60)
        self.opened += 1
        if self.failures:
            raise self.failures.pop(0)
        settings["status"]("repacking the weights")
        return LLM(source, **settings)


def opened(server):
    entries = server.get("/v1/models")[2]["data"]
    return {entry["id"] for entry in entries if entry["status"]["value"] == "loaded"}


def ask(server, name, **more):
    return server.post("/v1/completions", {**ASK, "model": name, **more})


def test_models_are_opened_when_they_are_asked_for():
    with running(specs()) as server:
        assert server.get("/health")[0] == 200
        assert opened(server) == set()
        assert ask(server, "b-alias")[2]["model"] == "b"
        assert opened(server) == {"b"}
        assert ask(server, None)[2]["model"] == "a"
        assert opened(server) == {"a", "b"}
        status, _, error = ask(server, "d")
        assert (status, error["error"]["code"], error["error"]["param"]) == (404, "model_not_found", "model")
        assert "a, b, c" in error["error"]["message"]


def test_the_least_recently_used_one_is_closed():
    with running(specs(), max_models=2) as server:
        for name, expected in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
            assert ask(server, name)[0] == 200
            assert opened(server) == set(expected)


def stream_of(server, name):
    """A stream of a model, begun and not read on."""
    connection = server.connect()
    body = json.dumps({**ASK, "model": name, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert b"200" in connection.recv(100)
    return connection


def test_a_model_in_use_is_not_closed():
    """A request for another model waits until the one in use is given back."""
    with running(specs(), max_models=1, idle=0.1) as server:
        connection = stream_of(server, "a")
        found = []
        waiting = threading.Thread(target=lambda: found.append(ask(server, "b")))
        waiting.start()
        time.sleep(0.2)
        assert opened(server) == {"a"}
        assert not found
        late = ask(server, "c", timeout=0.05)
        assert (late[0], late[2]["error"]["code"]) == (504, "deadline_exceeded")
        connection.close()
        waiting.join(60)
        assert found[0][0] == 200


def test_idle_models_are_closed_and_opened_again():
    opener = Opener()
    with running(specs(("a",)), open_llm=opener, idle=0.2) as server:
        for times in (1, 2):
            assert ask(server, "a")[0] == 200
            assert server.get("/props")[2]["is_sleeping"] is False
            assert opener.opened == times
            for _ in range(500):
                if not opened(server):
                    break
                time.sleep(0.02)
            assert opened(server) == set()
            assert server.get("/health")[0] == 200
            assert server.get("/props")[2]["is_sleeping"] is True
            assert opener.opened == times


def test_counters_never_fall():
    """What a model has counted is still there when it is closed, and goes on when it is open again."""
    with running(specs(("a",)), idle=0.2, metrics_style="llamacpp") as server:
        for times in (1, 2):
            assert ask(server, "a", max_tokens=4, ignore_eos=True)[0] == 200
            while opened(server):
                time.sleep(0.02)
            lines = server.get("/metrics")[2].decode().splitlines()
            assert f"llamacpp:n_decode_total {4.0 * times}" in lines
            assert f"llamacpp:tokens_predicted_total {4.0 * times}" in lines


def test_memory_decides_where_there_is_no_count(monkeypatch):
    free = {"bytes": 10}
    monkeypatch.setattr(model_store, "bytes_needed", lambda path, settings: 8)
    monkeypatch.setattr(model_store, "bytes_free", lambda: free["bytes"])
    with running(specs()) as server:
        for name in "ab":
            ask(server, name)
        assert opened(server) == {"a", "b"}
        free["bytes"] = 5
        ask(server, "c")
        assert opened(server) == {"c"}


def test_a_device_without_room_gets_some():
    opener = Opener()
    with running(specs(), open_llm=opener) as server:
        assert ask(server, "a")[0] == 200
        opener.failures = [DeviceError("out of memory")]
        assert ask(server, "b")[0] == 200
        assert opened(server) == {"b"}
        assert opener.opened == 3


@pytest.mark.parametrize("error", [ModelFileError("broken file"), DeviceError("no room"), OSError("no such file")])
def test_a_model_that_cannot_be_opened_is_tried_again_later(error):
    opener = Opener()
    with running(specs(("a", "b")), open_llm=opener) as server:
        opener.failures = [error]
        status, _, answer = ask(server, "a")
        assert status == 500
        assert str(error) in answer["error"]["message"]
        assert ask(server, "a")[0] == 200


def test_health_tells_how_far_the_only_model_is():
    opener = Opener()
    opener.gate.clear()
    server_up, found = threading.Event(), {}

    def hold(source, **settings):
        settings["status"]("building GPU kernels 3/4")
        server_up.set()
        return opener(source, **settings)

    def look(server):
        assert server_up.wait(60)
        while server.serving.store.models[0].progress is None:
            time.sleep(0.01)
        found["health"] = server.get("/health")
        found["waiting"] = threading.Thread(target=lambda: found.update(answer=ask(server, "a")))
        found["waiting"].start()
        opener.gate.set()

    from tests.support.servers import http_server

    class Early(http_server.Running):
        def __init__(self, *args):
            self._looking = threading.Thread(target=look, args=(self,))
            self._looking.start()
            super().__init__(*args)

    original, http_server.Running = http_server.Running, Early
    try:
        with running(specs(("a",)), open_llm=hold) as server:
            server._looking.join(60)
            found["waiting"].join(60)
    finally:
        http_server.Running = original
    status, _, health = found["health"]
    assert (status, health["status"]) == (503, "loading")
    assert 0.7 < health["progress"] < 1
    assert found["answer"][0] == 200


@pytest.mark.parametrize(("names", "status"), [("a", 503), ("ab", 200)])
def test_health_before_anything_was_opened(names, status):
    """The socket answers earlier than the first model is begun: one model is not ready then, several need not be."""
    value, found = health_of(Serving(specs(names), ServeSettings()))
    assert found == status
    assert value.get("progress") == (0.0 if status == 503 else None)


def test_a_server_whose_only_model_cannot_be_opened_ends():
    def broken(source, **settings):
        raise EngineError("no such model")

    with running(specs(("a",)), open_llm=broken) as server:
        pass
    assert "no such model" in server.problem
