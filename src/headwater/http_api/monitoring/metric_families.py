"""Prometheus families by name, each created with its first sample."""

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from headwater.http_api.monitoring.token_intervals import cumulative_buckets
from headwater.messages.state import Distribution

LABELS = ("model_name", "dp_rank")


class MetricFamilies:
    """Collects the samples of one scrape for one model."""

    def __init__(self, model_name: str) -> None:
        self.families: dict[str, Any] = {}
        self._model_name = model_name

    def gauge(self, name: str, text: str, value: float, *, rank: str, **labels: str) -> None:
        self._add(GaugeMetricFamily, name, text, value, rank, labels)

    def counter(self, name: str, text: str, value: float, *, rank: str, **labels: str) -> None:
        self._add(CounterMetricFamily, name, text, value, rank, labels)

    def histogram(self, text: str, found: Distribution, *, rank: str) -> None:
        """A distribution that an engine counted."""
        name = f"headwater_{found.name}"
        if name not in self.families:
            self.families[name] = HistogramMetricFamily(name, text, labels=(*LABELS, *found.labels))
        buckets = cumulative_buckets(found.bounds, found.counts)
        labels = (self._model_name, rank, *found.labels.values())
        self.families[name].add_metric(labels, buckets=buckets, sum_value=found.total)

    def _add(self, kind: type, name: str, text: str, value: float, rank: str, labels: Mapping[str, str]) -> None:
        if name not in self.families:
            self.families[name] = kind(name, text, labels=(*LABELS, *labels))
        self.families[name].add_metric((self._model_name, rank, *labels.values()), value)
