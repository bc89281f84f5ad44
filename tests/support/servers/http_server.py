"""A server in a thread of this process, on a free port, with the bundled model."""

import asyncio
import http.client
import json
import socket
import threading
from contextlib import contextmanager

from engine import LLM
from engine.serve.models.model_store import ModelSpec, ModelStore
from engine.serve.server import bind, serve
from engine.serve.serving import Serving
from engine.serve.settings import ServeSettings

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
"""A chat template for a model that has none; thoughts are between <think> and </think>."""
ENGINE = {"device": "cpu", "threads": 2, "max_sequences": 4, "chat_template": TEMPLATE}


class Running:
    """A server that runs in a thread.

    Attributes:
        port: on 127.0.0.1.
        url: without a path.
        serving: its state; to be read from other threads only.
        llm: the first model, once it is open.
        thread: that of the event loop.
    """

    def __init__(self, specs, settings, open_llm):
        self._settings = settings
        self._ready = threading.Event()
        self._sockets = bind("127.0.0.1", 0)
        self.port = self._sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.problem = None
        self._specs, self._open_llm = specs, open_llm
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        assert self._ready.wait(60), "the server did not begin"

    async def _serve(self):
        try:
            settings = self._settings
            store = ModelStore(self._specs, max_models=settings.max_models, idle=settings.idle, open_llm=self._open_llm)
            self.serving = Serving(self._specs, settings, store)
            self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.problem = await serve(self.serving, self._sockets, self._ready.set, self._stop)
        finally:
            self._ready.set()

    @property
    def listening(self):
        """The socket that accepts connections; asyncio uses another object of the same socket."""
        return self._sockets[0]

    @property
    def llm(self):
        return self.serving.store.models[0].llm.llm

    def begin_end(self):
        """What SIGTERM does."""
        self.loop.call_soon_threadsafe(self._stop.set)

    def stop(self):
        if self.thread.is_alive():
            self.begin_end()
        self.thread.join(60)
        assert not self.thread.is_alive(), "the server did not end"

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, body) of one request; JSON is parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            data = response.read()
            kind = response.headers.get("content-type", "")
            return response.status, response.headers, json.loads(data) if "json" in kind and "nd" not in kind else data
        finally:
            connection.close()

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, body, **options):
        return self.request("POST", path, body, **options)

    def events(self, path, body):
        """(event name, parsed data) of a stream; the last one of OpenAI's is "[DONE]"."""
        status, headers, data = self.post(path, body)
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        return parse_events(data)

    def connect(self):
        """A plain socket."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def settle(self, seconds=30):
        """Wait until nothing runs; returns what is left in the engine."""
        waiting = threading.Event()
        for _ in range(int(seconds / 0.02)):
            now = self.llm.occupancy()
            model = self.serving.store.models[0]
            left = (len(now.slots), now.waiting, now.preempted, now.held_pages, model.users, model.sequences)
            if not any(left):
                break
            waiting.wait(0.02)
        return left


def parse_events(data):
    found = []
    for block in data.decode().split("\n\n"):
        name, text = None, None
        for line in block.split("\n"):
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                text = line[6:]
        if text is not None:
            found.append((name, text if text == "[DONE]" else json.loads(text)))
    return found


@contextmanager
def running(specs=None, *, open_llm=LLM, engine=None, **settings):
    """A server with these models (the bundled one by default) and settings."""
    specs = specs or [ModelSpec("tales", None, ("story",), {**ENGINE, **(engine or {})})]
    server = Running(specs, ServeSettings(**settings), open_llm)
    try:
        yield server
    finally:
        server.stop()
