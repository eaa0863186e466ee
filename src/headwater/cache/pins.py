"""Prefixes that an operator keeps in the cache for a while."""

import itertools
from dataclasses import dataclass

from headwater.cache.lease import Lease
from headwater.cache.namespace import Namespace
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.token_sequence import TokenSequence
from headwater.clock import Clock, Deadline
from headwater.messages import TokenIds

_MAX_PART = 0.5  # of the device's pages that may be pinned, so that requests always find some


@dataclass(frozen=True, slots=True)
class Pin:
    """A lease nobody computes with."""

    pin_id: str
    namespace: Namespace
    lease: Lease
    deadline: Deadline
    num_tokens: int


class PinLimit(ValueError):
    """More pages would be pinned than may be."""


class PinBoard:
    """All pins. A pin ends at its deadline, when it is taken off, or when a flush retires what it holds."""

    def __init__(self, cache: PrefixCache, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._pins: dict[str, Pin] = {}
        self._ids = itertools.count(1)

    def __iter__(self):
        return iter(self._pins.values())

    def pin(self, namespace: Namespace, tokens: TokenIds, *, ttl_s: float) -> Pin:
        """Pin what the device holds of `tokens`. Raises `PinLimit`."""
        lease = self._cache.acquire(namespace, TokenSequence(tokens), max_cached_tokens=len(tokens), no_store=True)
        num_pinned = sum(pin.lease.num_pages for pin in self._pins.values()) + lease.num_pages
        if num_pinned > _MAX_PART * self._cache.pool.capacity:
            self._cache.release(lease)
            raise PinLimit(f"at most {_MAX_PART:.0%} of {self._cache.pool.capacity} pages may be pinned")
        pin = Pin(
            pin_id=f"pin-{next(self._ids)}",
            namespace=namespace,
            lease=lease,
            deadline=Deadline.after(self._clock, ttl_s),
            num_tokens=lease.num_pages * self._cache.page_size,
        )
        self._pins[pin.pin_id] = pin
        return pin

    def unpin(self, pin_id: str) -> bool:
        """Whether there was such a pin."""
        pin = self._pins.pop(pin_id, None)
        if pin is not None:
            self._cache.release(pin.lease)
        return pin is not None

    def advance(self) -> None:
        """Once a turn: end what has expired or was retired."""
        for pin in list(self._pins.values()):
            if pin.lease.retirements or pin.deadline.has_passed(self._clock):
                self.unpin(pin.pin_id)

    def remaining_s(self, pin: Pin) -> float:
        return pin.deadline.remaining_s(self._clock)
