"""Replicas on a Ray cluster of this machine: as one server to clients, and apart where it matters."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import openai
import pytest

from scripts.soak_serve import Load, soak_in_parts
from tests.support.servers.ray_load import STORY, ask_either_way, complete, conversations, under_load
from tests.support.servers.ray_server import running, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server():
    with running("--replicas", "2", "--cache-tokens", "8192", "-c", "1024") as one:
        yield one


def test_a_stream_through_the_openai_package(server):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    pieces = client.completions.create(model="m", prompt=STORY, max_tokens=24, temperature=0, stream=True)
    streamed = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    whole = client.completions.create(model="m", prompt=STORY, max_tokens=24, temperature=0)
    assert streamed == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="m", prompt=STORY, temperature=-1)


def test_the_same_text_with_a_seed_whichever_replica_answers(server):
    fields = {"max_tokens": 24, "temperature": 1.0, "seed": 7}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(server, STORY, **fields)[2], range(24)))
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    each = server.get("/metrics/replicas")
    for number in "01":
        assert f'replica="{number}"' in each
    counts = [line.split()[-1] for line in each.splitlines() if line.startswith("vllm:generation_tokens_total")]
    assert all(float(count) > 0 for count in counts)
    assert sum(map(float, counts)) == server.metric("vllm:generation_tokens_total")


def test_one_id_goes_with_a_request(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": STORY, "max_tokens": 1}), {"X-Request-Id": "a-1"}
    )
    headers = connection.getresponse().getheaders()
    connection.close()
    assert [value for name, value in headers if name.lower() == "x-request-id"] == ["a-1"]


def test_a_client_that_goes_away_frees_its_place(server):
    lines = server.lines("/v1/completions", prompt=STORY, max_tokens=900, ignore_eos=True)
    next(lines)
    assert server.metric("vllm:num_requests_running") == 1
    lines.close()
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 10)


def test_conversations_find_their_pages(server):
    assert conversations(server, 10, 5) >= 0.9


def test_a_lost_replica_takes_only_its_requests_with_it(server):
    first = server.replicas()
    assert len(first) == 2
    with under_load(server, 8, ask_either_way) as outcomes:
        os.kill(stopped_with_requests(server, outcomes), signal.SIGKILL)
        wait_for(lambda: len(set(server.replicas()) - set(first)) == 1, 60)
        wait_for(lambda: server.get("/metrics/replicas").count("vllm:num_requests_running{") == 2, 60)
        time.sleep(1)
    assert set(outcomes) <= {"ok", "lost"}, outcomes
    assert 1 <= outcomes["lost"] <= 8, outcomes
    assert outcomes["ok"] > 20


def stopped_with_requests(server, outcomes):
    """Stops a replica at a moment at which it has requests of its own; its process id."""
    for _ in range(10):
        replica = server.busiest_replica()
        os.kill(replica, signal.SIGSTOP)
        try:
            wait_for(lambda: outcomes.overtaken(24), 20)  # less than the 30 s after which Ray replaces it
            return replica
        except AssertionError:  # it had none when it was stopped, and gets none
            os.kill(replica, signal.SIGCONT)
    raise AssertionError("no replica ever had a request")


def test_many_requests_leave_nothing_behind(server):
    outcome = soak_in_parts(server, Load(requests=1000, clients=16, failures=0), server.processes, first=0.4)
    assert outcome.lost == 0
    assert outcome.left == (0, 0)
    assert outcome.flat, (outcome.first, outcome.last)
    assert outcome.counts["left"] > 100, outcome.counts
    assert set(outcome.counts) <= {"completed", "left", "late", "full"}, outcome.counts
