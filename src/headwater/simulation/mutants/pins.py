"""Mutants of pins that give way to requests."""

from typing import Any

from headwater.cache.lease import Lease
from headwater.cache.pins import Pin, PinBoard
from headwater.control.pinning import Pinning
from headwater.scheduling.request import Request
from headwater.scheduling.running import RunningRequests
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="pins", seed=23)
def pins_never_give_way() -> list[Patch]:
    """A request that needs pinned pages waits until the pins end, and all requests behind it."""
    return [(PinBoard, "give_way", lambda self, num_pages, *, to: False)]


@mutant(profile="pins", seed=23)
def pins_give_way_beside_running_requests() -> list[Patch]:
    """Pins give way though a running request will free its pages."""
    right = RunningRequests.reserve

    def reserve(self: RunningRequests, request: Request, lease: Lease) -> bool:
        if right(self, request, lease):
            return True
        num_pages = len(request.tokens) // self._cache.page_size + 1 - lease.num_pages
        return self._pins_give_way(num_pages + len(self), request) and right(self, request, lease)

    return [(RunningRequests, "reserve", reserve)]


@mutant(profile="pins", seed=23)
def pins_give_way_beside_copies() -> list[Patch]:
    """Pins give way though a copy or a step in flight will free pages."""
    return [(RunningRequests, "_will_free_pages", lambda self: False)]


@mutant(profile="pins", seed=23)
def all_pins_give_way() -> list[Patch]:
    """Every pin on the device gives way, however few pages are missing."""

    def all_of_them(self: PinBoard, num_pages: int) -> list[Pin]:
        return [pin for pin in self if pin.lease is not None]

    return [(PinBoard, "_fewest", all_of_them)]


@mutant(profile="pins", seed=23)
def the_pin_that_ends_last_gives_way() -> list[Patch]:
    """The pins with most of their time left give way."""
    right = PinBoard._fewest

    def fewest(self: PinBoard, num_pages: int) -> list[Pin]:
        ends = {pin: pin.deadline for pin in self}
        backwards = sorted(ends.values(), key=lambda deadline: -deadline.at_s)
        for pin, deadline in zip(sorted(self, key=lambda pin: pin.deadline.at_s), backwards, strict=True):
            pin.deadline = deadline
        found = right(self, num_pages)
        for pin, deadline in ends.items():
            pin.deadline = deadline
        return found

    return [(PinBoard, "_fewest", fewest)]


@mutant(profile="pins", seed=23)
def pins_give_way_on_the_host_too() -> list[Patch]:
    """A pin that gives way loses its pages on the host as well."""
    right = PinBoard._give_up_device

    def give_up(self: PinBoard, pin: Pin, reason: str) -> None:
        if pin.hold is not None:
            self._cache.lower.release_hold(pin.hold)
            pin.hold = None
        right(self, pin, reason)

    return [(PinBoard, "_give_up_device", give_up)]


@mutant(profile="pins", seed=75)
def pins_give_way_unlisted() -> list[Patch]:
    """The list of pins does not say that one has given way."""
    right = Pinning._info

    def info(self: Pinning, pin: Pin) -> Any:
        reason, pin.gave_way = pin.gave_way, ""
        found = right(self, pin)
        pin.gave_way = reason
        return found

    return [(Pinning, "_info", info)]


@mutant(profile="pins", seed=57)
def pins_give_way_without_a_notice() -> list[Patch]:
    """Clients do not learn of a pin that has given way, and set it again after a restart."""
    return [(Pinning, "take_notices", lambda self: [])]
