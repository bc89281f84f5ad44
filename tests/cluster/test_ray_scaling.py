"""Replicas that come and go with the requests. A file of its own: the cluster of the other tests has ended before."""

import time

import pytest

from tests.support.servers.ray_load import complete, conversations, under_load
from tests.support.servers.ray_server import running, wait_for

pytestmark = pytest.mark.ray


def test_replicas_come_and_go_without_a_failed_request():
    scaling = ("--min-replicas", "1", "--max-replicas", "2", "--target-requests", "2", "--downscale-delay", "2")
    with running(*scaling, "--router", "least-busy") as server:

        def ask(server, number, prompt):
            return complete(server, prompt, max_tokens=60)[0]

        with under_load(server, 8, ask) as many:
            wait_for(lambda: server.get("/metrics/replicas").count("vllm:num_requests_running{") == 2, 60)
            time.sleep(1)
        assert conversations(server, 10, 5) <= 0.75  # what Ray's own way of choosing gives
        with under_load(server, 1, ask) as few:
            wait_for(lambda: len(server.replicas()) == 1, 60)
        assert set(many + few) == {200}
