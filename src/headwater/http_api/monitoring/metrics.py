"""Prometheus metrics that the API process keeps itself: latencies and tokens of requests.

The names are SGLang's, so that its dashboards work; every series carries `model_name`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headwater.generation.answer_fields import cached_tokens_details
from headwater.generation.concurrency import Account
from headwater.generation.text_generation import GenerationObserver, Stages, TextGeneration
from headwater.http_api.monitoring.engine_metrics import engine_metrics
from headwater.http_api.monitoring.token_intervals import IntervalHistogram
from headwater.http_api.response_store import ResponseStore
from headwater.messages.cache import StorageInfo
from headwater.messages.control import OperationList
from headwater.messages.state import EngineState

# From a small model whose prompt is cached (a millisecond) to a large one behind a long queue.
TTFT_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400,
)  # fmt: skip
ITL_BUCKETS_S = (
    0.00025, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4,
    1, 2, 5,
)  # fmt: skip
LATENCY_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 5, 10, 20, 40, 80, 150, 300, 600, 1200, 2400,
)  # fmt: skip
STAGE_BUCKETS_S = (0.0005, *TTFT_BUCKETS_S, 800, 1600)
STAGES = tuple(name.removesuffix("_s") for name in Stages._fields)
LENGTH_BUCKETS = tuple(1 << power for power in range(18))
HIT_RATE_WINDOW = 100  # finished requests


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram since the start: upper bounds in seconds (the last is infinite), and observations up to each."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]


class RequestMetrics:
    """A `GenerationObserver` for one served name. Not thread-safe."""

    def __init__(self, families: "RequestFamilies", model_name: str) -> None:
        self._families = families
        self._model_name = model_name
        self._ttft = families.ttft.labels(model_name)
        self._itl = families.itl.labels(model_name)

    def first_token(self, waited_s: float) -> None:
        self._ttft.observe(waited_s)

    def next_tokens(self, interval_s: float, num_tokens: int) -> None:
        self._itl.add(interval_s / num_tokens, num_tokens)

    def ended(self, generation: TextGeneration) -> None:
        families, name = self._families, self._model_name
        finish = generation.finish
        families.requests.labels(name).inc()
        families.generated.labels(name).inc(len(generation.token_ids))
        if finish is None or finish.type == "abort":
            families.aborted.labels(name).inc()
        else:
            families.latency.labels(name).observe(generation.elapsed_s)
        if generation.meta is None:
            return
        families.prompts.labels(name).inc(generation.num_prompt_tokens)
        families.prompt_lengths.labels(name).observe(generation.num_prompt_tokens)
        families.answer_lengths.labels(name).observe(len(generation.token_ids))
        for stage, seconds in zip(STAGES, generation.stages(), strict=True):
            families.stages.labels(name, stage).observe(seconds)
        families.queue_time.labels(name).observe(generation.meta.queue_time_s)
        num_cached = 0
        for tier, num_tokens in cached_tokens_details(generation.meta).items():
            families.cached.labels(name, tier).inc(num_tokens)
            num_cached += num_tokens
        families.uncached.labels(name).observe(generation.num_prompt_tokens - num_cached)
        families.recent_hits.append((num_cached, generation.num_prompt_tokens))


class RequestFamilies:
    """The metric families behind `RequestMetrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sglang:{name}", text, ("model_name", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, text, ("model_name", *labels), registry=registry, buckets=tuple(buckets))

        self.requests = counter("num_requests", "Requests that ended, however.")
        self.aborted = counter("num_aborted_requests", "Requests that were aborted, failed or left by their client.")
        self.prompts = counter("prompt_tokens", "Prompt tokens of requests that started.")
        self.generated = counter("generation_tokens", "Tokens generated.")
        self.cached = counter("cached_tokens", "Prompt tokens found in the cache.", "cache_source")
        self.ttft = histogram("sglang:time_to_first_token_seconds", "From arrival to first token.", TTFT_BUCKETS_S)
        name, text = "sglang:inter_token_latency_seconds", "Between two tokens of an answer."
        self.itl = IntervalHistogram(name, text, "model_name", buckets=ITL_BUCKETS_S)
        registry.register(self.itl)
        self.latency = histogram("sglang:e2e_request_latency_seconds", "From arrival to last token.", LATENCY_BUCKETS_S)
        self.queue_time = histogram("sglang:queue_time_seconds", "Waiting in the engine's queue.", TTFT_BUCKETS_S)
        text = "Time of a request in each stage: queue, load, prefill, decode."
        self.stages = histogram("headwater_request_stage_seconds", text, STAGE_BUCKETS_S, "stage")
        name, text = "sglang:prompt_tokens_histogram", "Prompt tokens of a request."
        self.prompt_lengths = histogram(name, text, LENGTH_BUCKETS)
        name, text = "sglang:generation_tokens_histogram", "Tokens generated for a request."
        self.answer_lengths = histogram(name, text, LENGTH_BUCKETS)
        self.uncached = histogram(
            "sglang:uncached_prompt_tokens_histogram", "Prompt tokens that had to be computed.", LENGTH_BUCKETS
        )
        self.recent_hits: deque[tuple[int, int]] = deque(maxlen=HIT_RATE_WINDOW)

    def hit_rate(self) -> float:
        """Cached share of the prompt tokens of the last requests."""
        num_tokens = sum(num_prompt_tokens for _, num_prompt_tokens in self.recent_hits)
        return sum(num_cached for num_cached, _ in self.recent_hits) / num_tokens if num_tokens else 0.0


class _Snapshot(Collector):
    """Families made for one scrape."""

    def __init__(self) -> None:
        self.families: list[Metric] = []

    def describe(self) -> Iterator[Metric]:
        return iter(())  # so that registration does not collect

    def collect(self) -> list[Metric]:
        return self.families


class Metrics:
    """The page /metrics of one app."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second, useless series beside each counter
        self._registry = CollectorRegistry()
        self._families = RequestFamilies(self._registry)
        self._snapshot = _Snapshot()
        self._registry.register(self._snapshot)
        self._observers: dict[str, RequestMetrics] = {}

    def observer(self, model_name: str) -> GenerationObserver:
        """The observer that counts the requests of a served name."""
        if model_name not in self._observers:
            self._observers[model_name] = RequestMetrics(self._families, model_name)
        return self._observers[model_name]

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A counter more on the page, beside those that every server has."""
        return Counter(name, text, labels, registry=self._registry)

    def latency(self) -> dict[str, Buckets]:
        """The histograms of `ttft` and `itl` over all served names, as /metrics shows them."""
        families = self._families
        return {
            "ttft": _buckets(families.ttft.collect(), TTFT_BUCKETS_S),
            "itl": _buckets(families.itl.collect(), ITL_BUCKETS_S),
        }

    def page(
        self,
        model_name: str,
        states: list[EngineState | Exception],
        operations: list[OperationList | Exception],
        storage: Sequence[StorageInfo | Exception] = (),
        *,
        responses: ResponseStore,
        accounts: Sequence[Account] = (),
    ) -> bytes:
        """The text of /metrics. An engine that did not answer has `headwater_engine_up 0`."""
        hit_rate = GaugeMetricFamily(
            "sglang:cache_hit_rate",
            f"Cached share of the prompt tokens of the last {HIT_RATE_WINDOW} requests.",
            labels=("model_name",),
        )
        hit_rate.add_metric((model_name,), self._families.hit_rate())
        stored = _stored_responses(model_name, responses)
        num_refused = sum(account.num_refused for account in accounts)
        engines = engine_metrics(model_name, states, operations, storage, num_over_concurrency=num_refused)
        self._snapshot.families = [hit_rate, *stored, *engines]
        return generate_latest(self._registry)


def _buckets(families: Iterable[Metric], bounds_s: Sequence[float]) -> Buckets:
    counts = dict.fromkeys((*bounds_s, math.inf), 0)
    for family in families:
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                counts[float(sample.labels["le"])] += int(sample.value)
    return Buckets(tuple(counts), tuple(counts.values()))


def _stored_responses(model_name: str, responses: ResponseStore) -> list[Metric]:
    families: list[Metric] = []
    for name, text, value in (
        ("stored_responses", "Responses that are kept for previous_response_id.", len(responses)),
        ("stored_response_bytes", "Bytes of the kept responses.", responses.num_bytes),
    ):
        family = GaugeMetricFamily(f"headwater_{name}", text, labels=("model_name",))
        family.add_metric((model_name,), value)
        families.append(family)
    return families
