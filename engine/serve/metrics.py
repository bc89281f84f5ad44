"""What the server counts, in Prometheus' text form, under vLLM's names or llama.cpp's. Knows no HTTP."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.request import GenerationStats
from engine.scheduling.occupancy import Occupancy
from engine.serve.models.model_store import ModelStore, ServedModel

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 80.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_MODEL = ("model_name",)


class Metrics:
    """Counters of one server.

    Args:
        store: the models.
        style: "vllm" or "llamacpp".
    """

    def __init__(self, store: ModelStore, style: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # times of creation double the lines and say nothing here
        self._registry = registry = CollectorRegistry()
        self._llamacpp = style == "llamacpp"
        self._totals = _Totals()
        if self._llamacpp:
            registry.register(_LlamaCpp(store, self._totals))
            return
        registry.register(_Vllm(store))

        def counter(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Counter:
            return Counter(f"vllm:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> _Histogram:
            registry.register(found := _Histogram(f"vllm:{name}", text, bounds))
            return found

        self._prompt = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked for in the cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._success = counter("request_success", "Requests finished.", ("model_name", "finished_reason"))
        self._failed = counter("request_failure", "Requests ended by an error.")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens.", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self._queued = histogram("request_queue_time_seconds", "From arrival to the first step.", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "Reading of the prompt.", _LONG)
        self._decode = histogram("request_decode_time_seconds", "From the first to the last token.", _LONG)

    def first_token(self, model: str, seconds: float) -> None:
        """A sequence got its first token so long after its request had arrived."""
        if not self._llamacpp:
            self._first.observe(model, seconds)

    def tokens(self, model: str, n: int, seconds: float) -> None:
        """A sequence got n further tokens, so long after the ones before."""
        if not self._llamacpp:
            self._between.observe(model, seconds / n, n)

    def finished(self, model: str, reason: str, stats: GenerationStats, seconds: float) -> None:
        """A sequence ended so long after its request had arrived."""
        totals = self._totals
        totals.prompt_tokens += stats.prompt_tokens - stats.cached_tokens
        totals.cached_tokens += stats.cached_tokens
        totals.prompt_seconds += stats.prompt_seconds
        totals.output_tokens += stats.output_tokens
        totals.output_seconds += stats.decode_seconds
        totals.longest = max(totals.longest, stats.prompt_tokens + stats.output_tokens)
        if self._llamacpp:
            return
        self._prompt.labels(model).inc(stats.prompt_tokens)
        self._generated.labels(model).inc(stats.output_tokens)
        self._queries.labels(model).inc(stats.prompt_tokens)
        self._hits.labels(model).inc(stats.cached_tokens)
        self._success.labels(model, "abort" if reason == "cancelled" else reason).inc()
        self._whole.observe(model, seconds)
        self._queued.observe(model, stats.queue_seconds)
        self._prefill.observe(model, stats.prompt_seconds)
        self._decode.observe(model, stats.decode_seconds)

    def failed(self, model: str) -> None:
        """A sequence was ended by an error."""
        if not self._llamacpp:
            self._failed.labels(model).inc()

    def text(self) -> bytes:
        """Everything as Prometheus reads it."""
        return generate_latest(self._registry)


class _Histogram(Collector):
    """Seconds by model. Tokens come in groups: many equal values cost as much as one, unlike in prometheus_client.

    Args:
        name: of the metric.
        text: what it says.
        bounds: upper bounds of the buckets but the last, which has none.
    """

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float, n: int = 1) -> None:
        """n values of so many seconds."""
        counts = self._counts.setdefault(model, [0] * (len(self._bounds) + 1))
        counts[bisect_left(self._bounds, seconds)] += n
        self._sums[model] = self._sums.get(model, 0.0) + n * seconds

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=_MODEL)
        bounds = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        for model, counts in self._counts.items():
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([model], buckets, self._sums[model])
        yield family


class _Totals:
    """Sums over all models, for the names that have no label."""

    prompt_tokens = 0
    cached_tokens = 0
    prompt_seconds = 0.0
    output_tokens = 0
    output_seconds = 0.0
    longest = 0


def occupancies(store: ModelStore) -> Iterator[tuple[ServedModel, Occupancy]]:
    """The open models and what they are doing."""
    for model in store.models:
        if model.llm is not None:
            yield model, model.llm.llm.occupancy()


class _Vllm(Collector):
    """Gauges, read from the engines when they are asked for."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", labels=_MODEL)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences that wait.", labels=_MODEL)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the cache in use, 0 to 1.", labels=_MODEL)
        preempted = CounterMetricFamily("vllm:num_preemptions", "Sequences preempted so far.", labels=_MODEL)
        for model, now in occupancies(self._store):
            name = [model.spec.name]
            running.add_metric(name, len(now.slots))
            waiting.add_metric(name, now.waiting + now.preempted)
            usage.add_metric(name, now.held_pages / max(now.pages, 1))
        for model in self._store.models:
            if model.props is not None:  # else it was never open
                preempted.add_metric([model.spec.name], model.counts.preemptions)
        yield from (running, waiting, usage, preempted)


class _LlamaCpp(Collector):
    """The names that llama-server uses, over all models together."""

    def __init__(self, store: ModelStore, totals: _Totals) -> None:
        self._store = store
        self._totals = totals

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        totals, now = self._totals, [one for _, one in occupancies(self._store)]
        pages, held = sum(one.pages for one in now), sum(one.held_pages for one in now)
        counts = [model.counts for model in self._store.models]
        steps, tokens = sum(one.steps for one in counts), sum(one.tokens for one in counts)
        counters = (
            ("prompt_tokens", "Prompt tokens computed.", totals.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the cache.", totals.cached_tokens),
            ("n_decode", "Steps that gave tokens.", steps),
            ("prompt_seconds", "Seconds spent on prompts.", totals.prompt_seconds),
            ("tokens_predicted", "Tokens generated.", totals.output_tokens),
            ("tokens_predicted_seconds", "Seconds spent on generating.", totals.output_seconds),
        )
        gauges = (
            ("prompt_tokens_seconds", "Prompt tokens per second.", _rate(totals.prompt_tokens, totals.prompt_seconds)),
            (
                "predicted_tokens_seconds",
                "Generated tokens per second.",
                _rate(totals.output_tokens, totals.output_seconds),
            ),
            ("n_busy_slots_per_decode", "Tokens of a step.", tokens / steps if steps else 0.0),
            ("n_tokens_max", "Most tokens of one sequence.", totals.longest),
            ("kv_cache_usage_ratio", "Part of the cache in use, 0 to 1.", held / pages if pages else 0.0),
            ("requests_processing", "Sequences in the batch.", sum(len(one.slots) for one in now)),
            ("requests_deferred", "Sequences that wait.", sum(one.waiting + one.preempted for one in now)),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"llamacpp:{name}", text, value=value)
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"llamacpp:{name}", text, value=value)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
