"""Metric families of the tiers: copies between them, dropped copies by cause, and the state of the store.

Quantities that SGLang measures have its names; docs/metrics.md lists all.
"""

from headwater.http_api.control.cache_report import DROPPED, TIER_EVENT, TRANSFERS, transfers
from headwater.http_api.monitoring.metric_families import MetricFamilies
from headwater.messages.cache import StorageInfo
from headwater.messages.state import EngineState

BREAKER_STATES = ("closed", "open", "half_open")
UNFULFILLED = "prefetch_"  # causes of dropped tokens that a prefetch had promised
BACKUP_CAUSES = ("host_full", "queue_full")
SGLANG_TRANSFERS = {  # our kind -> SGLang's counters of tokens and of bytes
    "offload": ("hicache_backup_tokens", "hicache_backup_bytes"),
    "restore": ("load_back_tokens", "load_back_bytes"),
    "persist": ("backuped_tokens", None),
    "prefetch": ("prefetched_tokens", None),
}
TEXTS = {
    "offload": "from the device to the host",
    "restore": "from the host to the device",
    "persist": "from the host to storage",
    "prefetch": "from storage to the host",
}


def is_shown_by_label(counter: str) -> bool:
    """Whether a family of this module shows this counter of the engine."""
    kind, _, quantity = counter.rpartition("_")
    is_named = counter.startswith((DROPPED, TIER_EVENT))
    return is_named or (kind in TRANSFERS and quantity in ("tokens", "bytes", "seconds"))


def add_transfers(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """Copies between tiers, if there is a tier to copy to."""
    if "host" not in state.tiers:
        return
    for kind, facts in transfers(state.counters, state.blockers).items():
        for quantity in ("tokens", "bytes", "seconds"):
            text = f"{quantity.capitalize()} of copies between tiers, by kind."
            page.counter(f"headwater_transfer_{quantity}", text, facts[quantity], rank=rank, kind=kind)
        text = "Copies between tiers that are under way, by kind."
        page.gauge("headwater_transfers_in_flight", text, facts["in_flight"], rank=rank, kind=kind)
        tokens_name, bytes_name = SGLANG_TRANSFERS[kind]
        page.counter(f"sglang:{tokens_name}", f"Tokens copied {TEXTS[kind]}.", facts["tokens"], rank=rank)
        if bytes_name is not None:
            page.counter(f"sglang:{bytes_name}", f"Bytes copied {TEXTS[kind]}.", facts["bytes"], rank=rank)
    for name, count in state.counters.items():
        if name.startswith(TIER_EVENT):
            text = "What else the engine counted about its tiers."
            event = name.removeprefix(TIER_EVENT)
            page.counter("headwater_tier_events", text, count, rank=rank, event=event)
    _add_drops(page, rank, state)


def _add_drops(page: MetricFamilies, rank: str, state: EngineState) -> None:
    num_not_backed_up = 0.0
    for name, num_tokens in state.counters.items():
        if not name.startswith(DROPPED):
            continue
        cause = name.removeprefix(DROPPED)
        page.counter(
            "headwater_dropped_tokens", "Tokens that did not get to a tier.", num_tokens, rank=rank, cause=cause
        )
        if cause in BACKUP_CAUSES:
            num_not_backed_up += num_tokens
        if cause.startswith(UNFULFILLED):
            text = "Tokens that storage was said to have and that did not come."
            reason = cause.removeprefix(UNFULFILLED)
            family = "sglang:storage_prefetch_unfulfilled_tokens"
            page.counter(family, text, num_tokens, rank=rank, reason=reason)
    text = "Tokens not copied to the host: it, or the queue of copies, was full."
    page.counter("sglang:hicache_backup_dropped_tokens", text, num_not_backed_up, rank=rank)


def add_storage(page: MetricFamilies, rank: str, info: StorageInfo) -> None:
    """The attached store, or only that no store is attached."""
    attached = 1.0 if info.kind else 0.0
    page.gauge("headwater_storage_attached", "1 while a store is attached.", attached, rank=rank)
    if not info.kind:
        return
    for state in BREAKER_STATES:
        value = 1.0 if info.breaker == state else 0.0
        text = "The circuit breaker of the store: 1 for the state it is in."
        page.gauge("headwater_storage_breaker", text, value, rank=rank, state=state)
    text = "1 while the store fails: the circuit breaker is not closed, or one kind of call fails again and again."
    page.gauge("headwater_storage_failing", text, float(info.trouble is not None), rank=rank)
    for name, text, value in (
        ("storage_pages", "Pages in the store, of all servers that share it.", info.num_pages),
        ("storage_bytes", "Bytes in the store, of all servers that share it.", info.num_bytes),
        ("storage_capacity_bytes", "Bytes the store may hold.", info.capacity_bytes),
    ):
        if value is not None:
            page.gauge(f"headwater_{name}", text, value, rank=rank, storage_backend=info.kind)
    for event, count in info.counters.items():
        text = "What the store and its circuit breaker counted since it was attached."
        page.gauge("headwater_storage_events", text, count, rank=rank, event=event)
