"""Prefixes that an operator keeps in the cache for a while."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from headwater.cache.host_hold import HostHold
from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace, Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import Clock, Deadline
from headwater.messages.base import TokenIds

_MAX_PART = 0.5  # of a tier's pages that may be pinned, so that requests always find some
_RETRY_S = 1.0  # after copies to the host that found no room


@dataclass(slots=True)
class Pin:
    """A lease that no request uses, a hold on the host, or both.

    A pin on the host alone keeps its lease until all pages have been copied there.
    """

    pin_id: str
    namespace: Namespace
    tiers: frozenset[Tier]
    deadline: Deadline
    num_tokens: int
    lease: Lease | None
    hold: HostHold | None = None
    retry_at_s: float = 0.0

    @property
    def is_retired(self) -> bool:
        """Whether a flush has covered any of its pages."""
        is_lease_retired = self.lease is not None and bool(self.lease.retirements)
        return is_lease_retired or (self.hold is not None and self.hold.is_retired)


class PinLimit(ValueError):
    """The pin would exceed the number of pages that may be pinned."""


class PinBoard:
    """All pins. A pin ends at its deadline, when it is removed, or when a flush retires any of its pages."""

    def __init__(self, cache: PrefixCache, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._pins: dict[str, Pin] = {}
        self._ids = itertools.count(1)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins.values())

    def pin(
        self, namespace: Namespace, tokens: TokenIds, *, ttl_s: float, tiers: frozenset[Tier], pin_id: str = ""
    ) -> Pin:
        """Pin on `tiers` the pages of `tokens` that the device holds. Pages that the host lacks are copied there first.

        Replaces a pin of the same `pin_id`; an empty one gets a new name.

        Raises `PinLimit`.
        """
        lease = self._cache.acquire(namespace, TokenSequence(tokens), max_cached_tokens=len(tokens), no_store=True)
        pin = Pin(
            pin_id=pin_id or f"pin-{next(self._ids)}",
            namespace=namespace,
            tiers=tiers,
            deadline=Deadline.after(self._clock, ttl_s),
            num_tokens=lease.num_pages * self._cache.page_size,
            lease=lease,
        )
        for tier in sorted(tiers):
            if self._num_pinned(tier) + lease.num_pages > _MAX_PART * self._cache.tier_pages[tier].pool.capacity:
                self._cache.release(lease)
                most = f"{_MAX_PART:.0%} of {self._cache.tier_pages[tier].pool.capacity}"
                raise PinLimit(f"at most {most} {tier.name.lower()} pages may be pinned")
        self.unpin(pin.pin_id)
        self._pins[pin.pin_id] = pin
        if Tier.HOST in tiers:
            pin.hold = self._cache.lower.hold()
            self._hold_more(pin)
        return pin

    def unpin(self, pin_id: str) -> bool:
        """Whether there was such a pin."""
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            return False
        if pin.hold is not None:
            self._cache.lower.release_hold(pin.hold)
        if pin.lease is not None:
            self._cache.release(pin.lease)
        return True

    def advance(self) -> None:
        """Once a turn: end pins that have expired or were retired, and hold pages that have arrived on the host."""
        if not self._pins:
            return
        for pin in list(self._pins.values()):
            if pin.is_retired or pin.deadline.has_passed(self._clock):
                self.unpin(pin.pin_id)
            elif pin.hold is not None and pin.lease is not None and not pin.hold.is_complete:
                self._hold_more(pin)

    def remaining_s(self, pin: Pin) -> float:
        return pin.deadline.remaining_s(self._clock)

    def _hold_more(self, pin: Pin) -> None:
        assert pin.hold is not None and pin.lease is not None
        may_copy = self._clock.now() >= pin.retry_at_s
        if may_copy:
            pin.retry_at_s = self._clock.now() + _RETRY_S
        self._cache.lower.extend_hold(pin.hold, pin.lease, may_copy=may_copy)
        if pin.hold.is_complete and Tier.DEVICE not in pin.tiers:
            self._cache.release(pin.lease)
            pin.lease = None

    def _num_pinned(self, tier: Tier) -> int:
        """Pages that pins hold on `tier`, including those still being copied there."""
        return sum(pin.num_tokens for pin in self._pins.values() if tier in pin.tiers) // self._cache.page_size
