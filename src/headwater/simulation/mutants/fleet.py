"""Mutants of servers with several engines. `python -m` this module hunts all of them."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from headwater.client import standing as standing_module
from headwater.client.change_call import ChangeCall, Phase
from headwater.client.desired_state import DesiredState
from headwater.client.fleet import Fleet
from headwater.client.standing import Restoring, Standing
from headwater.control.control_plane import ControlPlane
from headwater.control.operation import PendingOperation
from headwater.control.pending_operations import PendingOperations
from headwater.engine import loop as loop_module
from headwater.messages.adapters import LoadAdapter
from headwater.messages.control import PauseGeneration
from headwater.messages.state import EngineState
from headwater.messages.two_phase import Change, Commit, Prepared
from headwater.messages.weights import ReleaseMemory, SetWeightVersion, UpdateWeights
from headwater.simulation.fleet.run import FleetRun, fleet_run
from headwater.simulation.mutants.registry import Mutant, Patch, Verdict, mutant

TURNS_PER_RUN = 1500
FLEET_MUTANTS: dict[str, Mutant] = {}


fleet_mutant = partial(mutant, profile="fleet", into=FLEET_MUTANTS)


def hunt_fleet(
    mutant: Mutant, *, max_turns: int, first_seed: int | None = None, kind: type[FleetRun] = FleetRun
) -> Verdict:
    """Play runs with `mutant` in force until a promise is broken, or `max_turns` have gone by."""
    first_seed = mutant.seed if first_seed is None else first_seed
    num_turns = num_runs = 0
    while num_turns < max_turns:
        with mutant.in_force():
            result = fleet_run(first_seed + num_runs, num_turns=TURNS_PER_RUN, kind=kind)
        num_runs += 1
        num_turns += result.num_turns
        if result.failure is not None:
            return Verdict(mutant.name, result.failure.promise, num_turns, num_runs)
    return Verdict(mutant.name, None, num_turns, num_runs)


# --- all or none ---------------------------------------------------------------------------------------


@fleet_mutant()
def the_first_to_be_ready_decides() -> list[Patch]:
    """A change is decided as soon as one engine has prepared it."""
    right = Fleet._answered

    def hear(self: Fleet, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        if call.phase is Phase.PREPARING and isinstance(answer, Prepared) and not call.answers:
            call.engines = (engine,)
        right(self, call, engine, answer, now_s)

    return [(Fleet, "_answered", hear)]


@fleet_mutant()
def a_refusal_is_overheard() -> list[Patch]:
    """The other engines make a change that one engine cannot make."""
    right = Fleet._answered

    def hear(self: Fleet, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        if call.phase is Phase.PREPARING and not isinstance(answer, Prepared) and len(call.engines) > 1:
            call.engines = tuple(each for each in call.engines if each != engine)
            call.named = frozenset(call.engines)
            if not call.missing:
                call.phase = Phase.PREPARED
            self._advance(now_s)
            return
        right(self, call, engine, answer, now_s)

    return [(Fleet, "_answered", hear)]


@fleet_mutant(seed=1)
def files_are_not_compared() -> list[Patch]:
    """Two engines that read different files under one path both install them."""
    right = Fleet._answered

    def hear(self: Fleet, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        if call.phase is Phase.PREPARING and isinstance(answer, Prepared) and call.answers:
            answer = msgspec.structs.replace(answer, weights_id=call.weights_id)
        right(self, call, engine, answer, now_s)

    return [(Fleet, "_answered", hear)]


@fleet_mutant()
def prepared_is_done() -> list[Patch]:
    """An engine makes a change as soon as it is prepared, without waiting for the decision."""
    right = PendingOperations._report_prepared

    def report_prepared(self: PendingOperations, pending: PendingOperation) -> None:
        is_new = pending.permit.is_awaited and not pending.permit.is_reported
        right(self, pending)
        if is_new:
            pending.permit.is_given = True

    return [(PendingOperations, "_report_prepared", report_prepared)]


@fleet_mutant(seed=1)
def commits_overlap() -> list[Patch]:
    """A change is decided while another one is being confirmed."""
    right = Fleet._advance

    def advance(self: Fleet, now_s: float) -> None:
        self._committing, kept = None, self._committing
        right(self, now_s)
        self._committing = self._committing or kept

    return [(Fleet, "_advance", advance)]


# --- nothing after a no ----------------------------------------------------------------------------------


@fleet_mutant(seed=57)
def late_calls_are_taken() -> list[Patch]:
    """An engine carries out a call that it reads after the deadline."""
    return [(loop_module, "is_expired", lambda call, now_s: False)]


@fleet_mutant(seed=3)
def operations_outlive_their_caller() -> list[Patch]:
    """An engine finishes an operation that it has begun, even if its caller has gone."""
    right = PendingOperation.has_expired

    def has_expired(self: PendingOperation, clock: Any) -> bool:
        if right(self, clock):
            self.permit.is_given = True
        return False

    return [(PendingOperation, "has_expired", has_expired)]


@fleet_mutant()
def a_given_up_change_is_committed() -> list[Patch]:
    """Engines get the decision to make a change that was given up."""
    right = Fleet._cancel

    def cancel(self: Fleet, call: ChangeCall, engines: Iterable[int]) -> None:
        if call.phase is not Phase.PREPARING:
            right(self, call, engines)
            return
        for engine in engines:
            self._send(engine, Commit(call_id=self._new_call_id(), prepared=call.call_id))

    return [(Fleet, "_cancel", cancel)]


@fleet_mutant()
def silence_is_waited_for() -> list[Patch]:
    """A change with a silent engine is not answered before the engine speaks."""
    return [(ChangeCall, "next_look_s", property(lambda self: float("inf")))]


# --- who serves ------------------------------------------------------------------------------------------


@fleet_mutant()
def the_unconfirmed_serve_on() -> list[Patch]:
    """An engine that does not confirm a change keeps getting requests."""
    return [(Standing, "fence", lambda self, reason: None)]


@fleet_mutant(seed=5)
def a_fence_falls_with_the_next_change() -> list[Patch]:
    """An engine that confirms a change serves again, whatever it missed before."""
    return [(Standing, "confirm", Standing.serve)]


@fleet_mutant()
def a_new_process_serves_at_once() -> list[Patch]:
    """A restarted engine gets requests before its state was checked."""
    right = Fleet.engine_ready

    def engine_ready(self: Fleet, engine: int, ready: Any, now_s: float) -> None:
        right(self, engine, ready, now_s)
        assert self.desired is not None
        self.standings[engine].serve(self.desired)

    return [(Fleet, "engine_ready", engine_ready)]


@fleet_mutant()
def those_behind_get_requests() -> list[Patch]:
    """While a change is being confirmed, requests go to engines that have not confirmed it, although others have."""
    return [(Fleet, "candidates", lambda self: [s.index for s in self.standings if s.is_serving])]


@fleet_mutant(seed=85)
def late_commits_are_shrugged_off() -> list[Patch]:
    """An engine that gets a decision too late continues to take requests in its old state."""
    right = ControlPlane._commit

    def commit(self: ControlPlane, message: Commit, client: bytes) -> None:
        right(self, message, client)
        self.is_behind = False
        self._engine.scheduler.why_refusing.clear()

    return [(ControlPlane, "_commit", commit)]


# --- the state of a restarted engine ----------------------------------------------------------------------


def _forgets(kind: type) -> list[Patch]:
    right = standing_module.difference

    def difference(standing: Standing, state: EngineState, desired: DesiredState, *, call_id: str) -> Any:
        step = right(standing, state, desired, call_id=call_id)
        return None if isinstance(step, kind) else step

    return [(standing_module, "difference", difference)]


@fleet_mutant()
def weights_are_not_brought_back() -> list[Patch]:
    """A restarted engine keeps the weights that it has loaded."""
    return _forgets(UpdateWeights)


@fleet_mutant()
def the_label_is_not_brought_back() -> list[Patch]:
    """A restarted engine keeps the label of the command line."""
    return _forgets(SetWeightVersion)


@fleet_mutant()
def the_pause_is_not_brought_back() -> list[Patch]:
    """An engine that starts during a pause runs requests."""
    return _forgets(PauseGeneration)


@fleet_mutant(seed=500)
def adapters_are_not_brought_back() -> list[Patch]:
    """A restarted engine has no LoRA adapters, or those of the command line."""
    return _forgets(LoadAdapter)


@fleet_mutant()
def released_memory_is_taken_again() -> list[Patch]:
    """An engine that starts while memory is released keeps its memory."""
    return _forgets(ReleaseMemory)


@fleet_mutant()
def the_store_is_not_brought_back() -> list[Patch]:
    """A restarted engine has no store, or the one of the command line."""
    right = standing_module.difference

    def difference(standing: Standing, state: EngineState, desired: DesiredState, *, call_id: str) -> Any:
        return right(standing, state, replace(desired, store_revision=0), call_id=call_id)

    return [(standing_module, "difference", difference)]


@fleet_mutant()
def a_detach_is_forgotten() -> list[Patch]:
    """A detached store returns with an engine that missed the detach."""
    right = DesiredState.after

    def after(self: DesiredState, change: Change, **more: Any) -> DesiredState:
        told = right(self, change, **more)
        return replace(told, store=self.store, store_revision=self.store_revision) if told.store is None else told

    return [(DesiredState, "after", after)]


@fleet_mutant(seed=1)
def other_weights_will_do() -> list[Patch]:
    """An engine that reads other weights from the same path serves with them."""
    right = Restoring._next_step

    def next_step(self: Restoring, standing: Standing, state: EngineState, desired: DesiredState, now_s: float) -> None:
        if desired.weights[-1].path and state.weights_id.startswith(desired.weights[-1].path):
            state = msgspec.structs.replace(state, weights_id=desired.weights_id)
        right(self, standing, state, desired, now_s)

    return [(Restoring, "_next_step", next_step)]


@fleet_mutant(seed=3)
def who_comes_during_a_change_misses_it() -> list[Patch]:
    """An engine that begins to serve while a change is being prepared counts as having made it."""
    right = Fleet._record

    def record(self: Fleet, call: ChangeCall, **more: Any) -> None:
        call.named = frozenset(call.engines)
        right(self, call, **more)

    return [(Fleet, "_record", record)]


@fleet_mutant(seed=14)
def late_answers_are_lost() -> list[Patch]:
    """A change that the only engine made in time but reported too late is forgotten, so a restart loses it."""
    right = Fleet._answered_directly

    def hear_direct(self: Fleet, call: ChangeCall, engine: int, answer: Any, now_s: float) -> None:
        if call.outcome is None:
            right(self, call, engine, answer, now_s)
        else:
            self._forget(call)

    return [(Fleet, "_answered_directly", hear_direct)]


def print_hunts(mutants: Mapping[str, Mutant], hunt: Callable[..., Verdict]) -> int:
    """Print a Markdown table of the hunts of all mutants from seed 0. 1 if one was not noticed, else 0."""
    print("| what is broken | noticed as | turns | runs |\n|---|---|---|---|")
    has_missed = False
    for each in mutants.values():
        verdict = hunt(each, max_turns=200_000, first_seed=0)
        has_missed |= verdict.promise is None
        found = f"`{verdict.promise}`" if verdict.promise else "**not noticed**"
        print(f"| {each.breaks} | {found} | {verdict.num_turns:,} | {verdict.num_runs} |", flush=True)
    return int(has_missed)


if __name__ == "__main__":
    sys.exit(print_hunts(FLEET_MUTANTS, hunt_fleet))
