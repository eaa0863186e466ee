"""What steps with and without drafts take, from the steps of decodes that have ended."""

from collections import deque
from dataclasses import dataclass

from headwater.scheduling.plan import StepPlan
from headwater.scheduling.speculation.acceptance import StepCost

_WEIGHT = 0.2  # of one step without drafts: contexts grow
_MEASURED = 2  # steps without drafts, before a batch of a size has drafts
_MEASURED_EVERY = 300  # steps with drafts
_FEW = 8  # steps with drafts, before their time counts
_RECHECK = 500  # steps without drafts, after which drafts are tried whatever they took


@dataclass(slots=True)
class _Plain:
    """Steps without drafts of batches of one size."""

    seconds: float = 0.0  # mean
    num_due: int = _MEASURED
    num_drafted: int = 0  # since they were measured


class StepTimes:
    """The times of steps, by their rows.

    Where steps are launched ahead, one with drafts is not. It takes longer from its first drafted token on: the device
    waits for its plan, and computes several rows by other kernels than one. `jump` is this difference. On a CPU, which
    is never ahead, there is none.
    """

    def __init__(self) -> None:
        self._cost = StepCost()  # of steps with drafts; on a CPU of all
        self._plain: dict[int, _Plain] = {}  # by the bits of the number of requests
        self._num_drafted = 0
        self._num_since = 0  # steps launched ahead since the last with drafts
        self._in_flight: deque[tuple[float, bool]] = deque()  # when each was planned, and whether ahead of another
        self._ended_s = 0.0
        self.is_ahead = False  # whether a step was ever planned while another was in flight

    def planned(self, now_s: float) -> None:
        """A step is about to be launched."""
        self._in_flight.append((now_s, bool(self._in_flight)))
        if len(self._in_flight) > 1 and not self.is_ahead:
            self.is_ahead, self._cost = True, StepCost()

    def failed(self, now_s: float) -> None:
        """The oldest step in flight has ended without a result."""
        self._in_flight.popleft()
        self._ended_s = now_s

    def ended(self, plan: StepPlan, now_s: float) -> None:
        """The oldest step in flight has ended. Only steps of decodes alone count."""
        (planned_s, is_ahead), before_s = self._in_flight.popleft(), self._ended_s
        self._ended_s = now_s
        if plan.num_decodes < plan.num_rows:
            return
        took_s, idle_s = now_s - planned_s, planned_s - before_s
        if is_ahead:  # the device began it when it had ended the one before
            self._saw_plain(plan.num_rows, now_s - before_s)
        elif not self.is_ahead:
            self._cost.saw(plan.num_rows, took_s)
        elif plan.has_drafts:
            # a longer pause was not for the plan: nothing ran
            self._cost.saw(plan.num_rows, took_s + (idle_s if idle_s < took_s else 0.0))
            self._saw_drafted(plan.num_requests)

    def needs_plain(self, num_requests: int) -> bool:
        """Whether steps without drafts are to be measured, of batches of about this size."""
        plain = self._plain.get(num_requests.bit_length())
        return plain is None or plain.num_due > 0

    def row_share(self, num_rows: int) -> float:
        """All rows' share of the time of a step of `num_rows`."""
        return self._cost.row_share(num_rows)

    def jump(self, num_requests: int) -> float:
        """Tokens that are lost by having drafts at all in a step of so many requests."""
        plain = self._plain.get(num_requests.bit_length())
        if plain is None or not plain.seconds or self._num_drafted < _FEW or self._num_since >= _RECHECK:
            return 0.0
        slower = self._cost.seconds(num_requests) / plain.seconds - 1
        return num_requests * min(max(slower, 0.0), 1.0)

    def _saw_plain(self, num_requests: int, seconds: float) -> None:
        plain = self._plain.setdefault(num_requests.bit_length(), _Plain())
        plain.num_due, plain.num_drafted = max(plain.num_due - 1, 0), 0
        self._num_since += 1
        if seconds > 0:
            usual = plain.seconds or seconds
            plain.seconds = usual + _WEIGHT * (min(seconds, 3 * usual) - usual)

    def _saw_drafted(self, num_requests: int) -> None:
        self._num_drafted += 1
        self._num_since = 0
        plain = self._plain.setdefault(num_requests.bit_length(), _Plain())
        plain.num_drafted += 1
        if plain.num_drafted >= _MEASURED_EVERY:
            plain.num_due, plain.num_drafted = _MEASURED, 0
