"""The promises of pins to requests: they give way to a request that could never run beside them, and only then."""

from collections.abc import Iterable

import numpy as np

from headwater.cache.lease import Lease
from headwater.cache.pins import Pin
from headwater.engine.wiring import EngineParts
from headwater.messages.cache import GetPins, PinGaveWay, Pins
from headwater.messages.wire import ToClient
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.pending_calls import PendingCall
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.fakes.runner import FakeRunner

_NUM_TURNS_ALLOWED = 3  # a turn may only end what is due, or find that a restore is not worth it


class PinPromises:
    """Watches the pins of one engine, and recounts what each of them keeps from others."""

    def __init__(self, parts: EngineParts, *, runner: FakeRunner, copier: FakeCopier | None, oracle: Oracle) -> None:
        self._scheduler = parts.scheduler
        self._cache = parts.cache
        self._board = parts.scheduler.pins
        self._runner = runner
        self._copier = copier
        self._oracle = oracle
        self._clients: set[bytes] = set()  # that have said Hello
        self._noticed: set[tuple[bytes, str]] = set()  # in this turn, by client and pin
        self._now: dict[str, Pin] = {}  # that gave way in this turn
        self._before: set[str] = set()  # in earlier turns
        self._num_stuck = 0  # turns
        self._give_way = self._board.give_way
        self._board.give_way = self._checked_give_way  # type: ignore[method-assign]

    def said_hello(self, client: bytes) -> None:
        self._clients.add(client)

    def noticed(self, client: bytes, notice: PinGaveWay) -> None:
        """A client has got a notice."""
        pin = self._now.get(notice.pin_id)
        is_right = pin is not None and {tier.name.lower() for tier in pin.tiers} == set(notice.tiers)
        demand(is_right, "pins_say_that_they_gave_way", f"{notice} for {pin}")
        self._noticed.add((client, notice.pin_id))

    def answered(self, call: PendingCall, answer: ToClient) -> None:
        """A list of pins names those that gave way before this turn."""
        if not isinstance(answer, Pins) or not isinstance(call.message, GetPins):
            return
        for item in answer.items:
            is_due = item.pin_id in self._before
            demand(bool(item.gave_way) == is_due, "pins_say_that_they_gave_way", f"{item}, gave way: {is_due}")
            demand(not is_due or "device" not in item.tiers, "pins_say_that_they_gave_way", f"{item} holds the device")

    def check(self, *, has_launched: bool) -> None:
        """At the end of a turn."""
        self._num_stuck = self._num_stuck + 1 if not has_launched and self._is_stuck() else 0
        if self._num_stuck > _NUM_TURNS_ALLOWED:
            waiting = [request.rid for request in self._scheduler.waiting]
            raise Violation("pins_give_way", f"nothing runs, pins hold pages, and {waiting[:3]} wait")
        missed = {(client, name) for client in self._clients for name in self._now} - self._noticed
        demand(not missed, "pins_say_that_they_gave_way", f"no notice of {missed}")
        self._before |= self._now.keys()
        count = self._board.num_gave_way
        demand(count == len(self._before), "counts_are_right", f"{count} pins are said to have given way")
        self._now.clear()
        self._noticed.clear()

    # ------------------------------------------------------------------------------------------------

    def _is_stuck(self) -> bool:
        """Whether a request waits though it is admitted, and only pins hold pages."""
        scheduler = self._scheduler
        if not len(scheduler.waiting) or len(scheduler.running) or self._is_holding_pages():
            return False
        if not scheduler.admission.may_run or not any(pin.lease is not None for pin in self._board):
            return False
        models = (self._oracle.active[request.client, request.rid] for request in scheduler.waiting)
        return scheduler.admission.may_start or any(model.has_started for model in models)

    def _is_holding_pages(self) -> bool:
        """Whether a copy, or a step for requests that run no longer, holds device pages."""
        if self._copier is not None and self._copier.open_copies:
            return True
        return any(len(step.read) > len(self._scheduler.running) for step in self._runner.open_steps)

    def _checked_give_way(self, num_pages: int, *, to: str) -> bool:
        leases = {pin.lease: pin for pin in self._board if pin.lease is not None}
        is_over = {pin: pin.is_retired or not self._board.remaining_s(pin) for pin in leases.values()}
        pins = {pin: _pages(lease) for lease, pin in leases.items() if not is_over[pin]}
        others = set().union(*map(_pages, self._cache.leases - leases.keys()))
        num_on_host = {pin: _num_on_host(pin) for pin in pins}
        self._give_way(num_pages, to=to)
        gone = [pin for pin in pins if pin.gave_way and pin.pin_id not in self._before and pin.pin_id not in self._now]
        self._now |= {pin.pin_id: pin for pin in gone}
        if gone:
            self._check_last_resort(to)
            self._check_choice(gone, pins, others=others, num_pages=num_pages)
            kept = {pin: _num_on_host(pin) for pin in gone}
            is_kept = all(kept[pin] == num_on_host[pin] for pin in gone) and set(gone) <= set(self._board)
            demand(is_kept, "pins_stay_on_the_host", f"{[pin.pin_id for pin in gone]}: {kept}")
        return self._cache.num_available >= num_pages

    def _check_last_resort(self, rid: str) -> None:
        running = [request.rid for request in self._scheduler.running if request.rid != rid]
        demand(not running, "pins_give_way_last", f"for {rid}, though {running} run")
        demand(not self._is_holding_pages(), "pins_give_way_last", f"for {rid}, though a step or a copy holds pages")

    def _check_choice(self, gone: list[Pin], pins: dict[Pin, set[int]], *, others: set[int], num_pages: int) -> None:
        """The pins that end first give way, none that could be spared."""
        num_left = self._cache.num_available - len(_freed(gone, pins, others))  # before they gave way

        def is_enough(some: Iterable[Pin]) -> bool:
            return num_left + len(_freed(some, pins, others)) >= num_pages

        demand(is_enough(gone), "pins_give_way", f"{len(gone)} gave way, and {num_pages} pages are not there")
        for pin in gone:
            rest = [each for each in gone if each is not pin]
            demand(not is_enough(rest), "pins_give_way_last", f"{pin.pin_id} could be spared")
        last_s = max(pin.deadline.at_s for pin in gone)
        earlier = [pin for pin in pins if pin.deadline.at_s < last_s]
        demand(not is_enough(earlier), "pins_give_way_last", "pins that end earlier would have been enough")


def _num_on_host(pin: Pin) -> int:
    return 0 if pin.hold is None else pin.hold.num_pages


def _pages(lease: Lease) -> set[int]:
    part = set() if lease.part is None else set(np.concatenate([run.pages for run in lease.part.run.chain()]).tolist())
    return set(lease.page_table().tolist()) | part


def _freed(some: Iterable[Pin], pins: dict[Pin, set[int]], others: set[int]) -> set[int]:
    """The pages that nothing holds any more once `some` of the pins have given way."""
    some = set(some)
    kept = others.union(*(pages for pin, pages in pins.items() if pin not in some))
    return set().union(*(pins[pin] for pin in some)) - kept
