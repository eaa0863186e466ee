"""`GET /cache`: the cache in numbers, of each engine and of all."""

from collections.abc import Sequence
from typing import Any

from headwater.generation.answer_fields import Json
from headwater.http_api.control.flush_answer import summed_counts
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.messages.cache import StorageInfo
from headwater.messages.state import EngineState, TierState

TIERS = ("device", "host", "storage")
TRANSFERS = ("offload", "restore", "persist", "prefetch")
DROPPED = "dropped_tokens_"
TIER_EVENT = "tier_event_"


def cache_report(states: EngineAnswers, storage: EngineAnswers) -> Json:
    """The answer. Raises ApiError if no engine gave its state; `storage` is null if no engine reports a store."""
    found = [state for _, state in states.some_or_raise()]
    report = _sums(found)
    stores = [info for _, info in storage.succeeded if info.kind]
    report["storage"] = _store(stores[0]) if stores else None
    by_rank = dict(storage.succeeded)
    report["engines"] = [
        entry | {"storage": _store(by_rank[entry["dp_rank"]]) if entry["dp_rank"] in by_rank else None}
        for entry in states.entries(lambda state: _sums([state]))
    ]
    return report


def _sums(states: Sequence[EngineState]) -> Json:
    counters = summed_counts(state.counters for state in states)  # type: ignore[misc]
    size = states[0].page_size
    names = [name for name in TIERS if any(name in state.tiers for state in states)]
    return {
        "generation": max(state.generation for state in states),
        "namespaces": sum(state.namespaces for state in states),
        "page_size": size,
        "weights_ids": sorted({state.weights_id for state in states}),
        "tiers": {name: _tier([s.tiers[name] for s in states if name in s.tiers], size) for name in names},
        "side_caches": summed_counts(state.side_caches for state in states),
        "hits": hits(counters),
        "transfers": transfers(counters, summed_counts(state.blockers for state in states)),
        "dropped_tokens": _named(counters, DROPPED),
        "tier_events": _named(counters, TIER_EVENT),
        "evicted_tokens": counters.get("evicted_tokens", 0),
        "retired_tokens": counters.get("retired_tokens", 0),
        "retirements": counters.get("retirements", 0),
    }


def _named(counters: dict[str, Any], prefix: str) -> Json:
    return {name.removeprefix(prefix): value for name, value in counters.items() if name.startswith(prefix)}


def hits(counters: dict[str, Any]) -> Json:
    """Prompt tokens found on each tier since the start, and their share of all prompt tokens."""
    num_prompt = counters.get("prompt_tokens", 0)
    found = {tier: counters.get(f"cached_tokens_{tier}", 0) for tier in TIERS}
    found["all"] = sum(found.values())
    rate = {tier: tokens / num_prompt if num_prompt else 0.0 for tier, tokens in found.items()}
    return {"prompt_tokens": num_prompt, "tokens": found, "rate": rate}


def transfers(counters: dict[str, Any], in_flight: dict[str, int]) -> Json:
    """Per kind: tokens and bytes copied, their time (summed over copies) and speed, and the copies in flight."""
    found: Json = {}
    for kind in TRANSFERS:
        num_bytes, seconds = counters.get(f"{kind}_bytes", 0), counters.get(f"{kind}_seconds", 0.0)
        found[kind] = {
            "tokens": counters.get(f"{kind}_tokens", 0),
            "bytes": num_bytes,
            "seconds": seconds,
            "bytes_per_s": num_bytes / seconds if seconds else 0.0,
            "in_flight": in_flight.get(kind, 0),
        }
    return found


def _tier(states: list[TierState], page_size: int) -> Json:
    capacity, free, evictable = (sum(getattr(s, name) for s in states) for name in ("capacity", "free", "evictable"))
    page_bytes = states[0].page_bytes
    return {
        "capacity_pages": capacity,
        "used_pages": capacity - free,
        "free_pages": free,
        "evictable_pages": evictable,
        "cached_pages": sum(state.tree for state in states),
        "private_pages": sum(state.private for state in states),
        "retired_pages": sum(state.retired for state in states),
        "transfer_pages": sum(state.transfer for state in states),
        "ready_pages": sum(state.num_ready for state in states),
        "capacity_tokens": capacity * page_size,
        "used_tokens": (capacity - free) * page_size,
        "page_bytes": page_bytes,
        "capacity_bytes": capacity * page_bytes,
        "used_bytes": (capacity - free) * page_bytes,
    }


def _store(info: StorageInfo) -> Json | None:
    return facts_of(info, without=("call_id",)) if info.kind else None
