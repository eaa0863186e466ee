"""Prometheus families from snapshots of the engines.

Metrics that SGLang has keep its names (`sglang:`). Pages by owner, generations, blockers and operations are ours.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import Metric

from headwater.client.change_call import by_engine
from headwater.http_api.monitoring.cache_metrics import add_storage, add_transfers, is_shown_by_label
from headwater.http_api.monitoring.flush_metrics import add_flushes, add_residency
from headwater.http_api.monitoring.metric_families import MetricFamilies
from headwater.messages.cache import StorageInfo
from headwater.messages.control import OperationList
from headwater.messages.state import EngineState, TierState

OWNERS = ("free", "tree", "private", "retired", "transfer")

SGLANG_GAUGES: tuple[tuple[str, str, Callable[[EngineState], float]], ...] = (
    ("num_running_reqs", "Requests in the batch.", lambda s: s.num_running),
    ("num_queue_reqs", "Requests waiting.", lambda s: s.num_waiting),
    (
        "num_retracted_reqs",
        "Waiting requests that ran before and gave their pages back.",
        lambda s: s.num_retracted,
    ),
    ("num_paused_reqs", "Requests held by a pause.", lambda s: s.num_paused),
    ("gen_throughput", "Generated tokens per second.", lambda s: s.gen_throughput),
    ("max_total_num_tokens", "Tokens the device's KV cache holds.", lambda s: s.max_total_tokens),
)
DEVICE_GAUGES: tuple[tuple[str, str, Callable[[TierState, int], float]], ...] = (
    ("token_usage", "Share of the KV cache in use; what could be evicted is not.", lambda t, _: _usage(t)),
    ("kv_used_tokens", "Tokens in use; what could be evicted is not.", lambda t, size: used_pages(t) * size),
    ("kv_available_tokens", "Tokens in free pages.", lambda t, size: t.free * size),
    ("kv_evictable_tokens", "Cached tokens that can be evicted at once.", lambda t, size: t.evictable * size),
    ("kv_cache_memory_usage_gb", "Size of the KV cache.", lambda t, _: t.capacity * t.page_bytes / (1 << 30)),
)
HOST_GAUGES: tuple[tuple[str, str, Callable[[TierState, int], float]], ...] = (
    ("hicache_host_used_tokens", "Tokens on the host tier.", lambda t, size: (t.capacity - t.free) * size),
    ("hicache_host_total_tokens", "Tokens the host tier holds.", lambda t, size: t.capacity * size),
)
_LIMITED = ("headwater_limited_requests", "Requests that a limit refused or ended, by the limit.")
SGLANG_COUNTERS = {  # our counter -> SGLang's name and text
    "evicted_tokens": ("evicted_tokens", "Cached tokens evicted from the device."),
    "num_retractions": ("num_retracted_requests", "Requests that gave their pages back to let others run."),
}


def used_pages(tier: TierState) -> int:
    """Pages in use that cannot be evicted at once."""
    return tier.capacity - tier.free - tier.evictable


def _usage(tier: TierState) -> float:
    return used_pages(tier) / tier.capacity if tier.capacity else 0.0


def engine_metrics(
    model_name: str,
    states: list[EngineState | Exception],
    operations: list[OperationList | Exception],
    storage: Sequence[StorageInfo | Exception] = (),
    *,
    num_over_concurrency: int = 0,
) -> Iterable[Metric]:
    """All families for one scrape. An engine that did not answer has only `headwater_engine_up`.

    `num_over_concurrency`: requests that the API process refused because their key ran too many.
    """
    there = [(str(rank), state) for rank, state in by_engine(states) if isinstance(state, EngineState)]
    page = MetricFamilies(model_name)
    page.counter(*_LIMITED, num_over_concurrency, rank="", reason="concurrency")
    for rank, state in by_engine(states):
        up = 1.0 if isinstance(state, EngineState) else 0.0
        page.gauge("headwater_engine_up", "1 if the engine answers.", up, rank=str(rank))
    for rank, answer in by_engine(operations):
        if isinstance(answer, OperationList):
            _add_operations(page, str(rank), answer)
    for rank, info in by_engine(storage):
        if isinstance(info, StorageInfo):
            add_storage(page, str(rank), info)
    for rank, state in there:
        for name, text, value in SGLANG_GAUGES:
            page.gauge(f"sglang:{name}", text, value(state), rank=rank)
        _add_vllm_gauges(page, rank, state)
        if state.num_adapter_slots:
            _add_adapters(page, rank, state)
        _add_cache_sizes(page, rank, state)
        _add_tiers(page, rank, state)
        _add_counters(page, rank, state)
        _add_speculation(page, rank, state)
        add_transfers(page, rank, state)
        _add_own_gauges(page, rank, state)
        add_flushes(page, rank, state)
        add_residency(page, rank, state)
    return page.families.values()


def _add_vllm_gauges(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """What routers read that know vLLM's names alone: the gateway API's extension does, without a flag."""
    page.gauge("vllm:num_requests_running", "Requests in the batch.", state.num_running, rank=rank)
    page.gauge("vllm:num_requests_waiting", "Requests waiting.", state.num_waiting, rank=rank)
    text = "Share of the KV cache in use, from 0 to 1; what could be evicted is not."
    if (device := state.tiers.get("device")) is not None:
        page.gauge("vllm:kv_cache_usage_perc", text, _usage(device), rank=rank)


def _add_adapters(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """vLLM's gauge is the time of the scrape, as its labels are the information; then our own."""
    running, waiting = (
        ",".join(sorted(it.name for it in state.adapters if count(it)))
        for count in (lambda it: it.num_running, lambda it: it.num_waiting)
    )
    page.gauge(
        "vllm:lora_requests_info",
        "LoRA adapters with running and with waiting requests, as labels; the value is the time.",
        time.time(),
        rank=rank,
        max_lora=str(state.num_adapter_slots),
        waiting_lora_adapters=waiting,
        running_lora_adapters=running,
    )
    page.gauge("headwater_adapters", "LoRA adapters that are loaded.", len(state.adapters), rank=rank)
    text = "Contents of LoRA adapters that only requests which have begun still use."
    page.gauge("headwater_adapters_retired", text, state.num_retired_adapters, rank=rank)


def _add_cache_sizes(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """Where routers look for them: llm-d reads SGLang's or vLLM's, by the label of the pod.

    SGLang's were labels at first and are gauges now; so they are in llm-d.
    """
    size, num_pages = str(state.page_size), str(state.max_total_tokens // state.page_size)
    text = "Tokens of a page, and pages of the device, as labels."
    page.gauge("sglang:cache_config_info", text, 1.0, rank=rank, page_size=size, num_pages=num_pages)
    page.gauge("vllm:cache_config_info", text, 1.0, rank=rank, block_size=size, num_gpu_blocks=num_pages)
    page.gauge("sglang:page_size", "Tokens of a page.", state.page_size, rank=rank)
    page.gauge("sglang:num_pages", "Pages of the device.", int(num_pages), rank=rank)


def _add_tiers(page: MetricFamilies, rank: str, state: EngineState) -> None:
    for tier_name, gauges in (("device", DEVICE_GAUGES), ("host", HOST_GAUGES)):
        tier = state.tiers.get(tier_name)
        if tier is not None:
            for name, text, value in gauges:
                page.gauge(f"sglang:{name}", text, value(tier, state.page_size), rank=rank)
    for tier_name, tier in state.tiers.items():
        for owner in OWNERS:
            page.gauge(
                "headwater_pages",
                "Pages by tier and owner; the owners add up to the capacity.",
                getattr(tier, owner),
                rank=rank,
                tier=tier_name,
                owner=owner,
            )
        for name, text, value in (
            ("page_capacity", "Pages of a tier.", tier.capacity),
            ("pages_evictable", "Pages that can be evicted at once.", tier.evictable),
            ("pages_ready", "Pages that copies reach.", tier.num_ready),
            ("page_bytes", "Size of a page.", tier.page_bytes),
        ):
            page.gauge(f"headwater_{name}", text, value, rank=rank, tier=tier_name)


def _add_counters(page: MetricFamilies, rank: str, state: EngineState) -> None:
    for name, value in state.counters.items():
        if name.startswith("limited_"):
            page.counter(*_LIMITED, value, rank=rank, reason=name.removeprefix("limited_"))
        if is_shown_by_label(name) or name.startswith("limited_"):
            continue
        page.counter(f"headwater_{name}", f"Counted by the engine: {name}.", value, rank=rank)
        if name in SGLANG_COUNTERS:
            sglang_name, text = SGLANG_COUNTERS[name]
            page.counter(f"sglang:{sglang_name}", text, value, rank=rank)


def _add_speculation(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """SGLang's gauges, over the steps that had drafts since the start; none before the first."""
    num_steps, num_drafted = state.counters.get("spec_verify_steps", 0), state.counters.get("spec_draft_tokens", 0)
    if not num_steps:
        return
    num_accepted = state.counters["spec_accepted_tokens"]
    text = "Tokens of a request in a step that verified a draft."
    page.gauge("sglang:spec_accept_length", text, 1 + num_accepted / num_steps, rank=rank)
    page.gauge(
        "sglang:spec_accept_rate", "Share of drafted tokens that were right.", num_accepted / num_drafted, rank=rank
    )


def _add_own_gauges(page: MetricFamilies, rank: str, state: EngineState) -> None:
    for name, text, value in (
        ("cache_generation", "Retirements of cached KV so far.", state.generation),
        ("queued_tokens", "Prompt tokens of waiting requests.", state.num_waiting_tokens),
        ("paused", "1 while generation is paused.", float(state.paused)),
        ("namespaces", "Separate roots of the prefix tree.", state.namespaces),
        ("uptime_seconds", "Since the engine started.", state.uptime_s),
    ):
        page.gauge(f"headwater_{name}", text, value, rank=rank)
    for blocker, count in state.blockers.items():
        page.gauge("headwater_blockers", "What keeps the engine from idle.", count, rank=rank, blocker=blocker)
    for cache, count in state.side_caches.items():
        page.gauge("headwater_side_cache_entries", "Entries of caches without KV.", count, rank=rank, cache=cache)
    for part, num_bytes in state.memory_bytes.items():
        page.gauge("headwater_memory_bytes", "Memory by use.", num_bytes, rank=rank, part=part)


def _add_operations(page: MetricFamilies, rank: str, answer: OperationList) -> None:
    counts: dict[str, int] = {"flush_cache": 0}
    for operation in answer.items:
        counts[operation.kind] = counts.get(operation.kind, 0) + 1
    for kind, count in counts.items():
        page.gauge("headwater_operations_pending", "Operations that wait.", count, rank=rank, kind=kind)
