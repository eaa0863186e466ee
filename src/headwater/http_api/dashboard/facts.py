"""An operating page's snapshot as JSON: names and numbers of `/metrics`, `/cache` and `/control/operations` in one.

Numbers are integers where they can be, since differences are sent: a value that does not change costs nothing. No
member is null (`differences`).
"""

from collections.abc import Callable, Mapping, Sequence

from headwater.generation.answer_fields import Json
from headwater.http_api.control.cache_report import TRANSFERS
from headwater.http_api.dashboard.history import Sample
from headwater.http_api.dashboard.store_trouble import trouble_facts
from headwater.http_api.monitoring.metrics import Buckets
from headwater.messages.cache import StorageInfo
from headwater.messages.snapshot import MapNode, MapRoot, PrefixMap, Snapshot
from headwater.messages.state import EngineState, TierState

OWNERS = ("free", "tree", "private", "retired", "transfer")
COUNTED = (
    "prompt_tokens", "generated_tokens", "cached_tokens_device", "cached_tokens_host", "cached_tokens_storage",
    "num_finished", "num_aborted", "num_failed", "num_refused", "num_parked", "evicted_tokens", "retired_tokens",
    "retirements", "pins_gave_way",
)  # fmt: skip
Decode = Callable[[tuple[int, ...]], str]


def engine_facts(snapshot: Snapshot) -> Json:
    """One engine that answered, without its map."""
    state = snapshot.state
    return {
        "up": True,
        "requests": requests(state),
        "paused": state.paused,
        "held_by": list(state.held_by),
        "released_memory": list(state.released_memory),
        "blockers": state.blockers,
        "tiers": {name: tier_facts(tier) for name, tier in state.tiers.items()},
        "counters": {name: int(state.counters.get(name, 0)) for name in COUNTED},
        "copies": copies(state),
        "drops": _named(state.counters, "dropped_tokens_"),
        "generation": state.generation,
        "namespaces": state.namespaces,
        "page_size": state.page_size,
        "weights_id": state.weights_id,
        "weight_version": state.weight_version,
        "memory": state.memory_bytes,
        "uptime_s": int(state.uptime_s),
        "storage": storage_facts(snapshot.storage),
        "pins": {
            pin.pin_id: {
                "num_tokens": pin.num_tokens,
                "ends_in_s": int(pin.remaining_s),
                "cache_salt": pin.cache_salt,
                "extra_key": pin.extra_key,
                "tiers": list(pin.tiers),
                "gave_way": pin.gave_way,
            }
            for pin in snapshot.pins
        },
    }


def requests(state: EngineState) -> Json:
    """Requests by state. Parked ones gave their pages back and wait; the queue counts them as well."""
    return {
        "running": state.num_running,
        "queued": state.num_waiting,
        "loading": state.blockers.get("loading", 0),
        "parked": state.num_retracted,
        "max_running": state.max_running,
    }


def tier_facts(tier: TierState) -> Json:
    owners = {owner: getattr(tier, owner) for owner in OWNERS}
    return owners | {"capacity": tier.capacity, "evictable": tier.evictable, "page_bytes": tier.page_bytes}


def copies(state: EngineState) -> Json:
    """Per kind: bytes and milliseconds since the start, and copies in flight."""
    if "host" not in state.tiers:
        return {}
    return {
        kind: {
            "bytes": int(state.counters.get(f"{kind}_bytes", 0)),
            "ms": int(1000 * state.counters.get(f"{kind}_seconds", 0.0)),
            "in_flight": state.blockers.get(kind, 0),
        }
        for kind in TRANSFERS
    }


def storage_facts(info: StorageInfo) -> Json:
    """The attached store; empty if there is none."""
    if not info.kind:
        return {}
    capacity = {} if info.capacity_bytes is None else {"capacity_bytes": info.capacity_bytes}
    return capacity | {
        "kind": info.kind,
        "prefetch_policy": info.prefetch_policy,
        "write_policy": info.write_policy,
        "breaker": info.breaker,
        "num_pages": info.num_pages,
        "num_bytes": info.num_bytes,
        "message": info.message,
        "trouble": trouble_facts(info),
    }


def map_facts(found: PrefixMap, decode: Decode | None) -> Json:
    """Namespaces and nodes by number. With `decode`, each node has the beginning of its text."""
    return {
        "roots": {str(index): _root_facts(root) for index, root in enumerate(found.roots)},
        "nodes": {str(node.number): _node_facts(node, decode) for node in found.nodes},
        "left_out": found.num_left_out,
        "taken_ms": int(1000 * found.taken_s),
    }


def _root_facts(root: MapRoot) -> Json:
    return {
        "cache_salt": root.cache_salt,
        "extra_key": root.extra_key,
        "weights_id": root.weights_id,
        "num_tokens": root.num_tokens,
        "device": root.device,
        "host": root.host,
        "num_nodes": root.num_nodes,
    }


def _node_facts(node: MapNode, decode: Decode | None) -> Json:
    text = {} if decode is None else {"text": decode(node.first_ids)}
    return text | {
        "root": node.root,
        "parent": node.parent,
        "depth": node.depth,
        "tokens": node.num_tokens,
        "below": node.below,
        "device": node.device,
        "host": node.host,
        "hits": node.num_hits,
        "pins": node.num_pins,
    }


def operations_facts(snapshots: Mapping[int, Snapshot]) -> Json:
    """Pending operations by the name that `DELETE /control/operations/{id}` takes, whatever number of engines."""
    found: Json = {}
    for rank, snapshot in snapshots.items():
        for item in snapshot.operations:
            entry = {
                "kind": item.kind,
                "phase": item.phase,
                "waited_s": round(item.waited_s, 1),
                "remaining_s": round(item.remaining_s, 1) if item.remaining_s < float("inf") else -1,
                "blockers": item.blockers,
                "ranks": [rank],
            }
            name = item.call_id or f"{item.operation_id}@{rank}"
            known = found.get(name)
            if known is None:
                found[name] = entry
                continue
            ranks = [*known["ranks"], rank]
            found[name] = (entry if entry["waited_s"] > known["waited_s"] else known) | {"ranks": ranks}
    return found


def sample_of(snapshots: Sequence[Snapshot], latency: Mapping[str, Buckets], *, now_ms: int) -> Sample:
    """The series of one moment, summed over the engines. Counts since the start: a page takes differences."""
    sample: Sample = {"t": now_ms}
    states = [snapshot.state for snapshot in snapshots]
    stores = [snapshot.storage for snapshot in snapshots if snapshot.storage.kind]
    if stores:  # its contents are those of all engines
        sample["storage.stored"] = max(store.num_bytes for store in stores)
    for name in ("running", "queued", "loading", "parked"):
        sample[name] = sum(requests(state)[name] for state in states)
    for name in COUNTED:
        sample[name] = int(sum(state.counters.get(name, 0) for state in states))
    for tier in dict.fromkeys(name for state in states for name in state.tiers):
        found = [state.tiers[tier] for state in states if tier in state.tiers]
        for owner in OWNERS:
            sample[f"{tier}.{owner}"] = sum(getattr(each, owner) for each in found)
    for state in states:
        for kind, facts in copies(state).items():
            for quantity in ("bytes", "ms"):
                name = f"{kind}.{quantity}"
                sample[name] = sample.get(name, 0) + facts[quantity]
    for name, buckets in latency.items():
        sample |= {f"{name}.{index}": count for index, count in enumerate(buckets.counts)}
    return sample


def _named(counters: Mapping[str, float], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): int(value) for name, value in counters.items() if name.startswith(prefix)}
