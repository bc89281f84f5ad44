"""A configuration file deployed, and another one in its place while clients ask; on a cluster of its own."""

import re
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.servers.ray_cluster import ray_cluster
from tests.support.servers.ray_load import ask_either_way, complete, conversations, under_load

pytestmark = pytest.mark.ray

REPLICAS = {"min_replicas": 2, "max_replicas": 2}


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    with ray_cluster(folder, cpus=2) as one:
        one.deploy(models=[{"name": "one"}], replicas=REPLICAS)
        one.wait_until("RUNNING", 120)
        yield one
    shutil.rmtree(folder, ignore_errors=True)


def models_of_replicas(server):
    """Of each replica the names of the models that generated something there."""
    pattern = r'^vllm:generation_tokens_total\{model_name="(\w+)",replica="(\d+)"\} (\S+)$'
    found = defaultdict(set)
    for model, replica, tokens in re.findall(pattern, server.get("/metrics/replicas"), re.MULTILINE):
        if float(tokens):
            found[replica].add(model)
    return sorted(map(sorted, found.values()))


def test_an_update_loses_no_request(cluster):
    server = cluster.server()
    before = server.replicas()
    two = [
        {"name": name, "settings": {"threads": 1, "context_length": 1024, "cache_tokens": 16384}}
        for name in ("one", "two")
    ]
    with under_load(server, 4, ask_either_way) as outcomes:
        cluster.deploy(models=two, server={"max_models": 1}, replicas=REPLICAS)
        time.sleep(2)
        cluster.wait_until("RUNNING", 90)
        time.sleep(1)
    assert set(outcomes) == {"ok"}, outcomes
    assert outcomes["ok"] > 20
    assert not set(before) & set(server.replicas())


def test_models_stay_where_they_are_open(cluster):
    """Each replica has room for one of the two models."""
    server = cluster.server()
    assert conversations(server, 8, 4, models=("one", "two")) >= 0.9
    assert models_of_replicas(server) == [["one"], ["two"]]


def test_a_file_with_an_unknown_name_changes_nothing(cluster):
    server = cluster.server()
    before = sorted(server.replicas())
    cluster.deploy(models=[{"name": "three", "settings": {"n_ctx": 512}}], replicas=REPLICAS)
    cluster.wait_until("DEPLOY_FAILED", 60)
    assert sorted(server.replicas()) == before
    assert complete(server, "Once", model="two", max_tokens=1)[0] == 200
