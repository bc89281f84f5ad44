"""Histograms against those of prometheus_client."""

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from engine.serve.metrics import _Histogram

BOUNDS = (0.0005, 0.25, 1.0, 7.5)


def test_a_histogram_is_that_of_prometheus_client():
    """Values on and beside the bounds, one by one there and in groups here."""
    disable_created_metrics()
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    grouped = _Histogram("x_seconds", "Some.", BOUNDS)
    ours.register(grouped)
    single = Histogram("x_seconds", "Some.", ("model_name",), registry=theirs, buckets=BOUNDS)
    for model, seconds, n in (("a", 0.25, 3), ("a", 0.0, 1), ("b", 0.25001, 2), ("a", 9.0, 4), ("b", 7.5, 1)):
        grouped.observe(model, seconds, n)
        for _ in range(n):
            single.labels(model).observe(seconds)
    lines = generate_latest(ours).splitlines()
    assert lines == generate_latest(theirs).splitlines()
    assert b'x_seconds_bucket{le="0.25",model_name="a"} 4.0' in lines
