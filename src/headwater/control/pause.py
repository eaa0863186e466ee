"""Pause: stop launching steps, and what becomes of the requests meanwhile."""

from collections.abc import Callable

from headwater.control.operation import Hold, Moment, Permit
from headwater.control.ports import RequestsPort, StepPort
from headwater.messages.control import Failed, PauseGeneration, PauseResult


class Pause:
    """Answers when the step in flight has been collected: from then on nothing computes until `continue`."""

    kind = "pause_generation"
    is_exclusive = False
    hold = Hold.NOTHING  # the pause itself bars all requests, also when this has been answered
    is_polling = False

    def __init__(
        self,
        message: PauseGeneration,
        *,
        requests: RequestsPort,
        step: StepPort,
        begin: Callable[[], None],
        permit: Permit | None = None,
    ) -> None:
        """`begin` bars all requests."""
        self._message = message
        self._begin = begin
        self._permit = permit or Permit()
        self._requests = requests
        self._step = step
        self._num_requests: int | None = None

    @property
    def phase(self) -> str:
        return "waiting_for_step"

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> PauseResult | None:
        if self._num_requests is None:
            if not self._permit.ask():
                return None
            self._begin()
            self._num_requests = self._apply()
        return self._result() if moment.has_expired or not self._step.is_step_in_flight() else None

    def cancelled(self, moment: Moment, reason: str) -> PauseResult | Failed:
        if self._num_requests is None and self._permit.is_given:
            self._num_requests = self._apply()
        if self._num_requests is not None:
            return self._result()  # what it did stays, only its answer comes early
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; generation was not paused")

    def _apply(self) -> int:
        if self._message.mode == "abort":
            return self._requests.abort_all("Aborted: generation was paused")
        if self._message.mode == "retract":
            return self._requests.retract_all()
        return self._requests.num_running

    def _result(self) -> PauseResult:
        return PauseResult(call_id=self._message.call_id, paused=True, num_requests=self._num_requests or 0)
