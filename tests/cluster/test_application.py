"""What a configuration file for `serve deploy` may say."""

import pytest

from engine.cluster.application import ClusterSettings, build
from engine.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "m.gguf"}, r"unknown arguments \['model'\]; allowed: models, replicas, server"),
        ({"models": [{"name": "m", "path": "m.gguf"}]}, "models: .*'path'"),
        ({"models": [{"name": "m", "settings": {"n_ctx": 9}}]}, "settings of m: .*'n_ctx'"),
        ({"models": [{"name": "m", "settings": {"threads": 0}}]}, "threads is 0"),
        ({"models": [{"name": "m"}, {"name": "n", "aliases": ["m"]}]}, "two models have the name 'm'"),
        ({"server": {"max_wating": 3}}, "server: .*'max_wating'"),
        ({"server": {"grace": -1}}, "grace is -1"),
        ({"replicas": {"min_replicas": 3, "max_replicas": 2}}, "3 to 2 replicas; allowed"),
        ({"replicas": {"router": "random"}}, "router is 'random'; allowed: prefix, least-busy"),
        ({"replicas": {"cpus": -1}}, "cpus is -1; allowed: at least 0"),
        ({"replicas": {"gpus": 2}}, "gpus is 2 for each replica; allowed: at most 1"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        build(arguments)


def test_a_number_that_is_none_is_refused():
    with pytest.raises(InvalidRequestError, match="target_requests is nan"):
        ClusterSettings(target_requests=float("nan"))


def test_an_application_is_made():
    assert build({"models": ["m.gguf"], "server": {"api_keys": ["k"]}, "replicas": {"max_replicas": 2}})
