"""Pause: no step is launched any more, and requests are ended, retracted or frozen."""

from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.messages.control import Failed, PauseGeneration, PauseResult


class Pause(Operation):
    """Answers when the step in flight has been collected: from then on nothing computes until `continue`.

    It holds nothing itself: `orders.is_paused` does, also when this has been answered.
    """

    kind = "pause_generation"

    def __init__(self, message: PauseGeneration, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._permit = permit
        self._num_requests: int | None = None

    @property
    def phase(self) -> str:
        return "waiting_for_step"

    def arrive(self) -> None:
        """A pause that needs no permit begins in this turn, whatever comes before it among the pending operations."""
        if self._permit.is_given:
            self._engine.orders.is_paused = True

    def look(self, moment: Moment) -> PauseResult | None:
        if self._num_requests is None:
            if not self._permit.ask():
                return None
            self._engine.orders.is_paused = True
            self._num_requests = self._apply()
        is_over = moment.has_expired or not self._engine.is_step_in_flight()
        return self._result(self._num_requests) if is_over else None

    def cancelled(self, moment: Moment, reason: str) -> PauseResult | Failed:
        if self._num_requests is None and self._permit.is_given:
            self._num_requests = self._apply()
        if self._num_requests is not None:
            return self._result(self._num_requests)  # what it did stays, only its answer comes early
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; generation was not paused")

    def _apply(self) -> int:
        if self._message.mode == "abort":
            return self._engine.abort_all("Aborted: generation was paused")
        if self._message.mode == "retract":
            return self._engine.scheduler.retract_all()
        return len(self._engine.scheduler.running)

    def _result(self, num_requests: int) -> PauseResult:
        return PauseResult(call_id=self._message.call_id, paused=True, num_requests=num_requests)
