"""Clients of a server with replicas: conversations, and load while something else happens."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

STORY = "Once upon a time there was a king who had "


def complete(server, prompt, **fields):
    """Status, headers and body of the answer to a prompt."""
    return server.post("/v1/completions", prompt=prompt, **fields)


def conversations(server, n, turns, models=("m",)):
    """Turns of conversations side by side, with the models in turn; how often the cache held the turn before."""
    dice, counts = random.Random(3), Counter()
    texts = [f"{number}. " + " ".join(dice.choices(STORY.split(), k=120)) for number in range(n)]

    def turn(number):
        model = models[number % len(models)]
        status, _, answer = complete(server, texts[number], model=model, max_tokens=8, temperature=0)
        assert status == 200, answer
        usage = answer["usage"]
        texts[number] += answer["choices"][0]["text"] + " " + " ".join(STORY.split() * 8)
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    before = [0] * n
    with ThreadPoolExecutor(4) as pool:
        for _ in range(turns):
            order = dice.sample(range(n), n)
            for number, (size, cached) in zip(order, pool.map(turn, order), strict=True):
                if before[number]:
                    counts["hit" if cached >= before[number] - 64 else "miss"] += 1
                before[number] = size
    return counts["hit"] / counts.total()


def ask_either_way(server, number, prompt, max_tokens=40):
    """Every other client streams; "ok", "lost" where the answer says that a replica was, or what else came."""
    if number % 2:
        try:
            last = list(server.lines("/v1/completions", prompt=prompt, max_tokens=max_tokens))[-1]
        except OSError:
            return "broken"
        return "ok" if last == "data: [DONE]" else "lost" if "try again" in last else last
    status, headers, answer = complete(server, prompt, max_tokens=max_tokens)
    if status == 503:
        assert "retry-after" in {name.lower() for name in headers}
        assert "again" in answer["error"]["message"]
    return {200: "ok", 503: "lost"}.get(status, status)


class Outcomes(Counter):
    """What came of requests, counted, and which of them have begun but not ended."""

    def __init__(self):
        super().__init__()
        self._open = {}

    def begin(self, client):
        """A client sends its next request."""
        self._open[client] = self.total()

    def end(self, client, outcome):
        """It has its answer."""
        del self._open[client]
        self[outcome] += 1

    def overtaken(self, n):
        """How many open requests have seen at least n others end: of requests that are all alike, those that hang."""
        return sum(self.total() - before >= n for before in list(self._open.values()))


@contextmanager
def under_load(server, clients, ask):
    """Clients that ask one after the other until the block ends; yields what came of it."""
    outcomes, stop = Outcomes(), threading.Event()

    def load(number):
        n = 0
        while not stop.is_set():
            n += 1
            outcomes.begin(number)
            outcomes.end(number, ask(server, number, f"{number} {n} {STORY}"))

    with ThreadPoolExecutor(clients) as pool:
        loads = [pool.submit(load, number) for number in range(clients)]
        try:
            yield outcomes
        finally:
            stop.set()
        for one in loads:
            one.result()
