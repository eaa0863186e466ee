"""The engine, as the operations act on it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from headwater.cache.namespace import Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import Clock
from headwater.control.orders import Orders
from headwater.control.pinning import Pinning
from headwater.control.ports import AdaptersPort, KvMemoryPort, WeightsPort
from headwater.control.reports.flush_counts import FlushCounts
from headwater.control.storage_control import StorageControl
from headwater.messages.control import PagesAndBytes
from headwater.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class ControlledEngine:
    """The parts that operations change or ask. One per engine, made by `engine/wiring.py`."""

    scheduler: Scheduler
    storage: StorageControl
    pinning: Pinning
    weights: WeightsPort
    kv_memory: KvMemoryPort
    adapters: AdaptersPort | None  # None: LoRA adapters are not served
    orders: Orders
    blockers: Callable[[], dict[str, int]]  # the only definition of idle: what is in flight, by name
    is_step_in_flight: Callable[[], bool]
    clock: Clock
    flushes: FlushCounts = field(default_factory=FlushCounts)

    @property
    def cache(self) -> PrefixCache:
        return self.scheduler.cache

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Enabled tiers, `device` first."""
        return tuple(tier.name.lower() for tier in self.cache.tiers)

    def abort_all(self, message: str) -> int:
        """End every request with `message`; returns how many."""
        return self.scheduler.abort("", match="all", message=message)

    def side_caches(self) -> dict[str, int]:
        """Entries of the caches that hold no KV, by name. A flush of everything empties them."""
        return {"grammars": self.scheduler.grammars.num_cached}

    def clear_side_caches(self) -> dict[str, int]:
        """Empty them; returns what was in each."""
        return {"grammars": self.scheduler.grammars.clear_cache()}

    def amounts(self, pages: dict[Tier, int]) -> dict[str, PagesAndBytes]:
        """`pages` of a retirement as an answer reports them: by name of the tier, with their bytes."""
        return {
            tier.name.lower(): PagesAndBytes(pages=pages[tier], bytes=pages[tier] * self.cache.page_bytes)
            for tier in self.cache.tier_pages
        }
