"""The snapshot of an engine for metrics, loads and server info."""

from headwater.cache.namespace import Tier
from headwater.cache.page_pool import Owner
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer import TransferCounters
from headwater.clock import Clock
from headwater.control.control_plane import ControlPlane
from headwater.control.reports.flush_counts import FlushCounts
from headwater.engine.blockers import Blockers
from headwater.messages.adapters import AdapterState
from headwater.messages.state import Distribution, EngineState, TierState
from headwater.scheduling.scheduler import Scheduler

_WINDOW_S = 1.0


class Throughput:
    """Generated tokens per second, over windows of at least a second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s = clock.now()
        self._num_tokens = 0
        self._rate = 0.0

    def rate(self, num_tokens: int) -> float:
        elapsed_s = self._clock.now() - self._since_s
        if elapsed_s >= _WINDOW_S:
            self._rate = (num_tokens - self._num_tokens) / elapsed_s
            self._since_s, self._num_tokens = self._clock.now(), num_tokens
        return self._rate


class StateReporter:
    """Makes an `EngineState` between two turns."""

    def __init__(
        self,
        *,
        clock: Clock,
        scheduler: Scheduler,
        cache: PrefixCache,
        control: ControlPlane,
        blockers: Blockers,
        flushes: FlushCounts,
        memory_bytes: dict[str, int],
    ) -> None:
        self._clock = clock
        self._scheduler = scheduler
        self._cache = cache
        self._control = control
        self._blockers = blockers
        self._flushes = flushes
        self._memory_bytes = memory_bytes
        self._throughput = Throughput(clock)
        self._started_s = clock.now()

    def __call__(self, call_id: str) -> EngineState:
        scheduler, cache = self._scheduler, self._cache
        is_paused = self._control.is_paused
        counters = scheduler.counters.as_dict() | scheduler.grammars.counters.as_dict() | {
            "evicted_tokens": cache.tier_pages[Tier.DEVICE].num_evicted * cache.page_size,
            "retired_tokens": cache.counters.retired_tokens,
            "retirements": cache.counters.retirements,
            "retired_pages_freed": sum(pages.num_retired_free for pages in cache.tier_pages.values()),
            "retired_pages_held": sum(pages.num_retired_held for pages in cache.tier_pages.values()),
            "pins_gave_way": scheduler.pins.num_gave_way,
        }
        if cache.lower.transfers is not None:
            counters |= transfer_counters(cache.lower.transfers.counters, cache.page_size, cache.page_bytes)
        return EngineState(
            call_id=call_id,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.grammars),
            num_waiting_tokens=scheduler.waiting.held.num_tokens,
            num_retracted=sum(1 for r in scheduler.waiting if r.num_retractions),
            num_paused=len(scheduler.running) + len(scheduler.waiting) if is_paused else 0,
            paused=is_paused,
            blockers=self._blockers(),
            tiers={tier.name.lower(): self._tier_state(tier, pages) for tier, pages in cache.tier_pages.items()},
            generation=cache.generation,
            weights_id=scheduler.weights_id,
            weight_version=scheduler.weight_version,
            page_size=cache.page_size,
            gen_throughput=self._throughput.rate(scheduler.counters.generated_tokens),
            uptime_s=self._clock.now() - self._started_s,
            counters=counters,
            max_running=scheduler.limits.max_running,
            max_total_tokens=cache.pool.capacity * cache.page_size,
            memory_bytes=self._memory_bytes,
            namespaces=len(cache.tree.roots),
            num_pending_operations=self._control.num_pending,
            is_behind=self._control.is_behind,
            num_decided=self._control.pending.num_decided,
            released_memory=self._control.released_memory,
            side_caches={"grammars": scheduler.grammars.num_cached},
            held_by=self._control.held_by,
            flushes=self._flushes.by_outcome(),
            flush_blockers=self._flushes.blockers(),
            distributions=self._distributions(),
            adapters=adapter_states(scheduler),
            num_adapter_slots=scheduler.adapters.num_slots,
            num_retired_adapters=scheduler.adapters.num_retired,
        )

    def _distributions(self) -> tuple[Distribution, ...]:
        found = self._flushes.distributions()
        for tier, pages in self._cache.tier_pages.items():
            if pages.residency is not None:
                found += pages.residency.distributions(tier.name.lower())
        return tuple(found)

    def _tier_state(self, tier: Tier, tier_pages: TierPages) -> TierState:
        pool, host = tier_pages.pool, self._cache.lower.host
        count_ready = host.num_ready if host is not None and tier is Tier.HOST else None
        return TierState(
            capacity=pool.capacity,
            free=pool.num_free,
            tree=pool.count(Owner.TREE),
            private=pool.count(Owner.PRIVATE),
            retired=pool.count(Owner.RETIRED),
            transfer=pool.count(Owner.TRANSFER),
            evictable=tier_pages.num_evictable,
            page_bytes=self._cache.page_bytes,
            ready=None if count_ready is None else count_ready(),
        )


def adapter_states(scheduler: Scheduler) -> tuple[AdapterState, ...]:
    """The adapters by name. Requests of an earlier content of a name are not counted."""
    states = []
    for named in scheduler.adapters.by_name.values():
        content = named.content
        num_running, num_waiting = scheduler.num_of_adapter(content)
        states.append(
            AdapterState(
                name=named.name,
                path=named.path,
                adapter_id=content.adapter_id,
                rank=content.rank,
                num_bytes=content.num_bytes,
                num_running=num_running,
                num_waiting=num_waiting,
            )
        )
    return tuple(states)


def transfer_counters(counters: TransferCounters, page_size: int, page_bytes: int) -> dict[str, float]:
    """`{kind}_tokens`, `_bytes`, `_seconds`, `dropped_tokens_{cause}` and `tier_event_{event}`, for the metrics."""
    found: dict[str, float] = {}
    for kind, pages in counters.pages.items():
        found[f"{kind}_tokens"] = pages * page_size
        found[f"{kind}_bytes"] = pages * page_bytes
        found[f"{kind}_seconds"] = counters.seconds[kind]
    for cause, pages in counters.dropped_pages.items():
        found[f"dropped_tokens_{cause}"] = pages * page_size
    for event, count in counters.events.items():
        found[f"tier_event_{event}"] = count
    return found
