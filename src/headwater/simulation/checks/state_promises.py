"""The promise of `EngineState`: what metrics and pages show of requests and of a pause is what there is."""

from collections.abc import Callable

from headwater.engine.wiring import EngineParts
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.violation import demand

_EVERY = 8  # turns: a report costs more than most turns


class StatePromises:
    """Recounts a report of one engine from the requests that the oracle follows."""

    def __init__(self, parts: EngineParts, *, oracle: Oracle, is_paused: Callable[[], bool]) -> None:
        """`is_paused`: by the orders that the engine has read."""
        self._parts = parts
        self._oracle = oracle
        self._is_paused = is_paused
        self._num_turns = 0

    def check(self) -> None:
        """At the end of a turn."""
        self._num_turns += 1
        if self._num_turns % _EVERY:
            return
        state, scheduler, active = self._parts.report(""), self._parts.scheduler, self._oracle.active
        num_running, waiting = len(self._oracle.running_keys()), list(scheduler.waiting)
        num_loading = len(scheduler.loading)
        num_waiting = sum(model.is_delivered for model in active.values()) - num_running - num_loading
        right = {
            "num_running": num_running,
            "num_waiting": num_waiting,
            "num_retracted": sum(active[request.client, request.rid].has_started for request in waiting),
            "paused": self._is_paused(),
            "num_paused": num_running + len(waiting) if self._is_paused() else 0,
        }
        told = {name: getattr(state, name) for name in right}
        demand(told == right, "state_is_reported", f"reported {told}, right is {right}")
