"""Metrics of several replicas as one text: sums under the names of one server, or each replica's own with a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_AVERAGED = ("_perc", "_ratio")
"""Ends of the names of gauges that are parts of a whole: their mean is told, not their sum."""


def summed(texts: Sequence[str]) -> str:
    """One text with the sums over replicas, of parts of a whole their means."""
    families: dict[str, Metric] = {}
    values: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                key = family.name, sample.name, tuple(sample.labels.items())
                values.setdefault(key, []).append(float(sample.value))
    for (family_name, name, labels), found in values.items():
        total = sum(found)
        families[family_name].add_sample(name, dict(labels), total / len(found) if name.endswith(_AVERAGED) else total)
    return _text(list(families.values()))


def labelled(texts: Sequence[str]) -> str:
    """One text with the values of every replica, told apart by the label `replica`, its number among them."""
    families: dict[str, Metric] = {}
    for number, text in enumerate(texts):
        for family in text_string_to_metric_families(text):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, "replica": str(number)}, sample.value)
    return _text(list(families.values()))


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _text(families: list[Metric]) -> str:
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry).decode()
