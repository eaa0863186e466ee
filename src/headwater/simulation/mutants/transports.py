"""Mutants of weights that trainers send. `python -m` this module hunts all of them."""

import sys
from functools import partial
from typing import Any

from headwater.client import desired_state as desired_state_module
from headwater.client.desired_state import WeightsStep
from headwater.client.fleet import Fleet
from headwater.simulation.fleet.transfer_run import TransferRun
from headwater.simulation.mutants.fleet import hunt_fleet, print_hunts
from headwater.simulation.mutants.registry import Mutant, Patch, mutant
from headwater.transports import bracket as bracket_module
from headwater.transports.bracket import Phase, Transfer, Transfers

TRANSPORT_MUTANTS: dict[str, Mutant] = {}

transport_mutant = partial(mutant, profile="transports", into=TRANSPORT_MUTANTS)
hunt_transport = partial(hunt_fleet, kind=TransferRun)


@transport_mutant()
def a_bucket_is_applied_before_the_end() -> list[Patch]:
    """A bucket within a bracket becomes visible when it arrives."""

    def begins(self: Transfers, transfer_id: str | None, *, deadline_s: float, now_s: float) -> Transfer:
        transfer = Transfer(self._new_id(), is_bracket=False, deadline_s=deadline_s)
        transfer.num_arriving += 1
        if self._open is not None:
            self._open.num_buckets += 1
        return transfer

    return [(Transfers, "bucket_begins", begins)]


@transport_mutant(seed=1)
def a_torn_bucket_is_accepted() -> list[Patch]:
    """A bracket of which a bucket was torn can be ended."""

    def fails(self: Transfers, transfer: Transfer, reason: str) -> None:
        transfer.num_arriving -= 1

    return [(Transfers, "bucket_fails", fails)]


@transport_mutant()
def a_refused_bucket_is_forgotten() -> list[Patch]:
    """A bracket of which a bucket had a wrong shape can be ended without it."""
    right = Transfers.bucket_ends

    def ends(self: Transfers, transfer: Transfer, tensors: Any, model: Any) -> None:
        try:
            right(self, transfer, tensors, model)
        finally:
            transfer.broken = None

    return [(Transfers, "bucket_ends", ends)]


@transport_mutant()
def staging_is_kept_after_the_deadline() -> list[Patch]:
    """A bracket whose trainer has died stays open for ever."""
    return [(Transfers, "tick", lambda self, now_s: None)]


@transport_mutant()
def an_overdue_bracket_is_only_forgotten() -> list[Patch]:
    """The tensors of a bracket that is given up stay in memory."""

    def give_up(self: Transfers, transfer: Transfer) -> None:
        if transfer is self._open:
            self._open = None
        transfer.phase = Phase.ENDED

    return [(Transfers, "_give_up", give_up)]


@transport_mutant()
def late_buckets_stand_alone() -> list[Patch]:
    """A bucket that comes after its bracket's deadline is an update by itself."""
    right = Transfers.tick

    def tick(self: Transfers, now_s: float) -> None:
        right(self, now_s)
        self._lost = None

    named = Transfers.bucket_begins

    def begins(self: Transfers, transfer_id: str | None, *, deadline_s: float, now_s: float) -> Transfer:
        tick(self, now_s)
        return named(self, transfer_id if self._open is not None else None, deadline_s=deadline_s, now_s=now_s)

    return [(Transfers, "tick", tick), (Transfers, "bucket_begins", begins)]


@transport_mutant(seed=1)
def a_second_begin_joins_the_first() -> list[Patch]:
    """Two trainers fill one bracket."""
    right = Transfers.begin

    def begin(self: Transfers, *, deadline_s: float, now_s: float) -> Transfer:
        self.tick(now_s)
        return self._open or right(self, deadline_s=deadline_s, now_s=now_s)

    return [(Transfers, "begin", begin)]


@transport_mutant(seed=3)
def a_second_begin_ends_the_first() -> list[Patch]:
    """A new bracket takes the place of an open one, and buckets of the old one fall into it."""
    right = Transfers.begin

    def begin(self: Transfers, *, deadline_s: float, now_s: float) -> Transfer:
        if self._open is not None:
            self._give_up(self._open)
        return right(self, deadline_s=deadline_s, now_s=now_s)

    def named(self: Transfers, transfer_id: str | None) -> Transfer:
        if self._open is None:
            raise bracket_module.TransferRefused(bracket_module.NO_BRACKET)
        return self._open

    return [(Transfers, "begin", begin), (Transfers, "_named", named)]


@transport_mutant()
def buckets_on_their_way_are_not_waited_for() -> list[Patch]:
    """A bracket ends while buckets of it are still arriving."""
    right = Transfers.end

    def end(self: Transfers, transfer_id: str | None, *, now_s: float) -> Transfer:
        if self._open is not None:
            self._open.num_arriving = 0
        return right(self, transfer_id, now_s=now_s)

    return [(Transfers, "end", end)]


@transport_mutant()
def the_label_runs_ahead_of_the_swap() -> list[Patch]:
    """A label that is given within a bracket is shown before its weights."""
    return [(Transfers, "take_label", lambda self, weight_version, **_: False)]


@transport_mutant()
def received_weights_are_not_kept() -> list[Patch]:
    """The tensors in place are deleted, so an engine that restarts cannot have them."""
    return [(Fleet, "staged_in_use", property(lambda self: frozenset()))]


@transport_mutant(seed=520)
def who_leaves_takes_the_tensors() -> list[Patch]:
    """The tensors of a change whose caller has left are deleted, though an engine may have put them in place."""

    def staged_in_use(self: Fleet) -> frozenset[str]:
        steps = () if self.desired is None else self.desired.weights
        return frozenset(step.path for step in steps if step.is_received)

    return [(Fleet, "staged_in_use", property(staged_in_use))]


@transport_mutant()
def released_weights_are_deleted() -> list[Patch]:
    """While memory is released, the tensors that a resume would read count as unused."""
    right = Fleet.staged_in_use.fget
    assert right is not None

    def staged_in_use(self: Fleet) -> frozenset[str]:
        return frozenset() if self.desired is not None and self.desired.released else right(self)

    return [(Fleet, "staged_in_use", property(staged_in_use))]


@transport_mutant(seed=48)
def parts_hide_more_than_they_replace() -> list[Patch]:
    """A part that replaces some tensors of an earlier part counts as if it replaced all of them."""

    def still_seen(steps: tuple[WeightsStep, ...], newest: WeightsStep) -> tuple[WeightsStep, ...]:
        return tuple(step for step in steps if not (step.is_received and len(step.names) < 4))

    return [(desired_state_module, "_still_seen", still_seen)]


if __name__ == "__main__":
    sys.exit(print_hunts(TRANSPORT_MUTANTS, hunt_transport))
