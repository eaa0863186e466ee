"""A runner that computes nothing but takes the modelled time: each request generates predetermined tokens."""

import numpy as np
import numpy.typing as npt

from headwater.clock import ManualClock
from headwater.planning.cost_model import CostModel
from headwater.scheduling.plan import StepPlan, StepResult, TokenMasks
from headwater.simulation.fakes.kv_records import make_records
from headwater.simulation.fakes.memory import FakeKvMemory, FakeWeights

_FIRST_TOKEN, _NUM_TOKENS = 1000, 30_000  # any ids will do


def foretold_tokens(seed: int, first: int, count: int) -> npt.NDArray[np.int32]:
    """The output tokens of a request with this sampling seed, from position `first` on. int32[count]."""
    return _tokens(np.full(count, seed, dtype=np.uint64), np.arange(first, first + count, dtype=np.uint64))


def _tokens(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """A multiplicative hash of seed and position (Knuth, TAOCP 3, 6.4)."""
    mixed = (seeds * np.uint64(0x9E3779B97F4A7C15)) ^ (positions * np.uint64(0xD6E8FEB86659FD93))
    return ((mixed >> np.uint64(33)) % np.uint64(_NUM_TOKENS) + np.uint64(_FIRST_TOKEN)).astype(np.int32)


class TimedStep:
    """A step that ends at a moment of the engine's clock. Collecting it earlier advances the clock to that moment."""

    def __init__(self, result: StepResult, *, ends_s: float, clock: ManualClock) -> None:
        self.ends_s = ends_s
        self._result = result
        self._clock = clock

    def choose(self, masks: TokenMasks) -> None:
        raise AssertionError("plans of capacity have no grammars")

    def is_done(self) -> bool:
        return self._clock.now() >= self.ends_s

    def collect(self) -> StepResult:
        self._clock.advance(max(0.0, self.ends_s - self._clock.now()))
        return self._result


class TimedRunner:
    """`engine.ports.ModelRunner` on a virtual clock. One step after another, as on one stream of a GPU.

    Without `is_async` a launch returns at the end of the step, as on a CPU.
    """

    def __init__(self, costs: CostModel, *, clock: ManualClock, max_running: int, is_async: bool) -> None:
        self.weights = FakeWeights()
        self.kv_memory = FakeKvMemory(make_records(1, 1))
        self.adapters = None  # LoRA adapters are not planned
        self.num_steps = 0
        self.busy_s = 0.0
        self._costs = costs
        self._clock = clock
        self._is_async = is_async
        self._free_s = 0.0  # the end of the last step
        self._seeds = np.zeros(max_running, dtype=np.uint64)

    def recover(self) -> None:
        """There is nothing to recover: planned steps do not fail."""

    def launch(self, plan: StepPlan) -> TimedStep:
        for assignment in plan.assignments:
            self._seeds[assignment.slot] = assignment.sampling.seed
        tokens = _tokens(self._seeds[plan.slots], plan.num_outputs.astype(np.uint64))
        result = StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=np.where(plan.samples, tokens, np.int32(-1)),
            is_finite=np.ones(plan.num_rows, dtype=np.bool_),
        )
        seconds = self._costs.step_s(plan)
        self._free_s = max(self._clock.now(), self._free_s) + seconds
        self.num_steps += 1
        self.busy_s += seconds
        step = TimedStep(result, ends_s=self._free_s, clock=self._clock)
        if not self._is_async:
            self._clock.advance(self._free_s - self._clock.now())
        return step
