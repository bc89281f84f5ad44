"""A few seconds of everything at once: every request is answered or closed, and nothing is left behind."""

from scripts.soak_serve import Load, soak
from tests.support.servers.http_server import running


def test_soak():
    with running(max_waiting=8, read_timeout=5.0, engine={"cache_tokens": 1536}) as server:
        counts = soak(server, Load(requests=120, clients=20, seed=1, failures=8))
        assert sum(counts.values()) - counts["full"] == 120
        assert counts["completed"] > 25
        for kind in ("left", "late", "failed", "full"):
            assert counts[kind] > 0, counts
        assert not any(server.settle())
