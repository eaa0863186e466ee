"""Prefixes that an operator keeps in the cache for a while."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from headwater.cache.host_hold import HostHold
from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace, Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Run
from headwater.clock import Clock, Deadline
from headwater.messages.base import TokenIds

_MAX_PART = 0.5  # of a tier's pages that may be pinned, so that pins seldom have to give way
_RETRY_S = 1.0  # after copies to the host that found no room
_MAX_LISTED = 100  # pins that hold nothing any more, since they gave way
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Pin:
    """A lease that no request uses, a hold on the host, or both.

    A pin on the host alone keeps its lease until all pages have been copied there. A pin that gave way may hold
    nothing, and is listed until its time ends.
    """

    pin_id: str
    namespace: Namespace
    tiers: frozenset[Tier]  # where it holds pages, or will
    deadline: Deadline
    num_tokens: int
    lease: Lease | None
    hold: HostHold | None = None
    retry_at_s: float = 0.0
    gave_way: str = ""  # why it has given up its device pages

    @property
    def device_runs(self) -> Iterator[Run]:
        """The runs that its lease pins."""
        return self.lease.run.chain() if self.lease is not None and self.lease.run is not None else iter(())

    @property
    def is_retired(self) -> bool:
        """Whether a flush has covered any of its pages."""
        is_lease_retired = self.lease is not None and bool(self.lease.retirements)
        return is_lease_retired or (self.hold is not None and self.hold.is_retired)


class PinLimit(ValueError):
    """The pin would exceed the number of pages that may be pinned."""


class PinBoard:
    """All pins. A pin ends at its deadline, when it is removed, or when a flush retires any of its pages.

    Its device pages give way to a request that could never run beside them.
    """

    def __init__(self, cache: PrefixCache, clock: Clock) -> None:
        self.num_gave_way = 0  # pins, ever
        self._gave_way: list[Pin] = []  # not taken by `take_gave_way` yet
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
        self._end_due()
        for pin in self._pins.values():
            if pin.hold is not None and pin.lease is not None and not pin.hold.is_complete:
                self._hold_more(pin)

    def give_way(self, num_pages: int, *, to: str) -> bool:
        """Make `num_pages` device pages available to the request `to`; False, and no pin is touched, if pins cannot.

        The caller has made sure that no other pages will be free. The pins whose time ends first give way, since these
        lose least, and only as many as it takes. What they hold on the host stays.
        """
        self._end_due()
        num_missing = num_pages - self._cache.num_available
        if num_missing <= 0:
            return True
        chosen = self._fewest(num_missing)
        for pin in chosen:
            self._give_up_device(pin, f"request {to!r} needed {num_missing} more pages than the pins had left")
        return bool(chosen)

    def take_gave_way(self) -> list[Pin]:
        """The pins that have given way since the last call."""
        taken, self._gave_way = self._gave_way, []
        return taken

    def remaining_s(self, pin: Pin) -> float:
        return pin.deadline.remaining_s(self._clock)

    def _end_due(self) -> None:
        for pin in list(self._pins.values()):
            if pin.is_retired or pin.deadline.has_passed(self._clock):
                self.unpin(pin.pin_id)

    def _fewest(self, num_pages: int) -> list[Pin]:
        """Pins that free `num_pages` together, none of which could be spared; empty if all pins free fewer.

        Pins share runs: a run is free when no pin, and no lease of a request, is left on it.
        """
        pins_left: dict[Run, int] = {}
        chosen: list[Pin] = []
        num_freed = 0
        for pin in sorted(self._pins.values(), key=lambda pin: pin.deadline.at_s):
            if num_freed >= num_pages:
                break
            chosen.append(pin)
            for run in pin.device_runs:
                pins_left[run] = pins_left.get(run, run.pins) - 1
                num_freed += 0 if pins_left[run] else len(run.pages)
        if num_freed < num_pages:
            return []
        needed: list[Pin] = []
        for pin in reversed(chosen):
            num_own = sum(len(run.pages) for run in pin.device_runs if not pins_left[run])
            if num_freed - num_own < num_pages:
                needed.append(pin)
                continue
            num_freed -= num_own
            for run in pin.device_runs:
                pins_left[run] += 1
        return needed

    def _give_up_device(self, pin: Pin, reason: str) -> None:
        assert pin.lease is not None
        self._cache.release(pin.lease)
        pin.lease, pin.gave_way, pin.tiers = None, reason, pin.tiers - {Tier.DEVICE}
        if pin.hold is not None and not pin.hold.num_pages:  # no copy has found room on the host
            self._cache.lower.release_hold(pin.hold)
            pin.hold, pin.tiers = None, frozenset()
        self.num_gave_way += 1
        self._gave_way.append(pin)
        left = "; it keeps its pages on the host" if pin.hold is not None else ""
        _log.info("pin %s gave way: %s%s", pin.pin_id, reason, left)
        over = [pin.pin_id for pin in self._pins.values() if not pin.tiers]
        for pin_id in over[:-_MAX_LISTED]:
            del self._pins[pin_id]

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
