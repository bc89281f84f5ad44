"""Metrics of several replicas as one text, read back with Prometheus' own parser."""

from prometheus_client.parser import text_string_to_metric_families

from engine.cluster.metrics import labelled, summed

ONE = """# HELP vllm:generation_tokens_total Tokens generated.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model_name="m"} 5.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="m"} 0.5
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 1.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 2.0
vllm:time_to_first_token_seconds_count{model_name="m"} 2.0
vllm:time_to_first_token_seconds_sum{model_name="m"} 0.75
"""
OTHER = ONE.replace(" 5.0", " 7.0").replace(" 0.5\n", " 0.25\n").replace('"m"} 2.0', '"m"} 3.0')
EMPTY = "# TYPE vllm:generation_tokens_total counter\n"


def samples(text):
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_sums_and_means():
    assert samples(summed([ONE, OTHER, EMPTY])) == {
        ("vllm:generation_tokens_total",): 12.0,
        ("vllm:kv_cache_usage_perc",): 0.375,
        ("vllm:time_to_first_token_seconds_bucket", "0.1"): 2.0,
        ("vllm:time_to_first_token_seconds_bucket", "+Inf"): 5.0,
        ("vllm:time_to_first_token_seconds_count",): 5.0,
        ("vllm:time_to_first_token_seconds_sum",): 1.5,
    }


def test_each_replica():
    found = samples(labelled([ONE, OTHER]))
    assert found["vllm:generation_tokens_total", "0"] == 5.0
    assert found["vllm:generation_tokens_total", "1"] == 7.0
    assert found["vllm:time_to_first_token_seconds_bucket", "+Inf", "1"] == 3.0
