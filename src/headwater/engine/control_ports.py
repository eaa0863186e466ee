"""What plugs the control plane into cache and scheduler, which it does not import."""

import dataclasses

from headwater.cache.namespace import Scope, Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.retirement import Retirement
from headwater.control.ports import FlushScope
from headwater.messages.control import PagesAndBytes
from headwater.scheduling.scheduler import Scheduler


class RetirementReport:
    """A `Retirement` in the words of the API: tiers by name, bytes beside pages."""

    def __init__(self, retirement: Retirement, cache: PrefixCache) -> None:
        self._retirement = retirement
        self._cache = cache

    @property
    def generation(self) -> int:
        return self._retirement.generation

    @property
    def is_drained(self) -> bool:
        return self._retirement.is_drained

    @property
    def num_holders(self) -> int:
        return self._retirement.num_leases

    @property
    def pending(self) -> tuple[str, ...]:
        return () if self._retirement.is_acknowledged else ("storage",)

    def freed(self) -> dict[str, PagesAndBytes]:
        return self._by_tier(self._retirement.freed)

    def retired(self) -> dict[str, PagesAndBytes]:
        return self._by_tier(self._retirement.retired)

    def _by_tier(self, pages: dict[Tier, int]) -> dict[str, PagesAndBytes]:
        return {
            tier.name.lower(): PagesAndBytes(pages=pages[tier], bytes=pages[tier] * self._cache.page_bytes)
            for tier in self._cache.tier_pages
        }


class CacheForControl:
    """`control.ports.CachePort` over the prefix cache."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(tier.name.lower() for tier in self._cache.tiers)

    def retire(self, scope: FlushScope) -> RetirementReport:
        return RetirementReport(self._cache.retire(_cache_scope(scope)), self._cache)

    def preview(self, scope: FlushScope) -> RetirementReport:
        preview = self._cache.preview(_cache_scope(scope))
        return RetirementReport(dataclasses.replace(preview), self._cache)


class RequestsForControl:
    """`control.ports.RequestsPort` over the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def abort_all(self, message: str) -> int:
        return self._scheduler.abort("", match="all", message=message)

    def retract_all(self) -> int:
        return self._scheduler.retract_all()

    def refuse_new(self, reason: str | None, *, cause: str = "behind") -> None:
        if reason is None:
            self._scheduler.why_refusing.pop(cause, None)
        else:
            self._scheduler.why_refusing[cause] = reason

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)


class IdentityForControl:
    """`control.ports.IdentityPort` over the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def weights_id(self) -> str:
        return self._scheduler.weights_id

    @property
    def weight_version(self) -> str:
        return self._scheduler.weight_version

    def set_weight_version(self, weight_version: str) -> None:
        self._scheduler.weight_version = weight_version

    def begin_weights(self, weights_id: str, *, end_ids: tuple[int, ...] = ()) -> None:
        self._scheduler.begin_weights(weights_id, end_ids=end_ids)


def _cache_scope(scope: FlushScope) -> Scope:
    return Scope(
        cache_salt=scope.cache_salt,
        extra_key=scope.extra_key,
        other_than_weights_id=scope.other_than_weights_id,
        prefix=scope.prefix,
        tiers=frozenset(Tier[name.upper()] for name in scope.tiers),
    )
