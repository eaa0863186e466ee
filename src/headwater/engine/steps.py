"""Launches and collects steps. A step that raises ends its own requests and nothing else."""

import logging
from collections import deque

from headwater.cache.page_pool import OwnershipError
from headwater.engine.ports import ModelRunner
from headwater.scheduling.plan import StepHandle, StepPlan, StepResult, TokenMasks
from headwater.scheduling.scheduler import Scheduler

_MAX_FAILED_IN_A_ROW = 10  # then the requests are not the cause: the engine ends, and is started again
_log = logging.getLogger(__name__)


class FailedLaunch:
    """The handle of a step that was not launched, or did not choose its tokens: collecting it raises why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def choose(self, masks: TokenMasks) -> None:
        """There is nothing to choose from."""

    def is_done(self) -> bool:
        return True

    def collect(self) -> StepResult:
        raise self._error


class Steps:
    """Between the loop and the runner. `survived` are the newest errors after which the loop went on."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._num_failed_in_a_row = 0
        self.uncollected: tuple[StepPlan, StepHandle] | None = None  # launched, not collected; the loop sets it
        self.survived: deque[Exception] = deque(maxlen=16)

    def is_step_in_flight(self) -> bool:
        return self.uncollected is not None

    def launch(self, plan: StepPlan) -> StepHandle:
        try:
            return self._runner.launch(plan)
        except OwnershipError:
            raise
        except Exception as error:  # noqa: BLE001  it is raised again when the step is collected, after the one before it
            return FailedLaunch(error)

    def choose(self, plan: StepPlan, handle: StepHandle) -> StepHandle:
        """Have the step just launched choose its tokens, if grammars limit the choice. Earlier ones are collected.

        Returns the handle from now on.
        """
        if not len(plan.grammar_rows) or isinstance(handle, FailedLaunch):
            return handle
        try:
            handle.choose(self._scheduler.masks.fill(plan))
        except OwnershipError:
            raise
        except Exception as error:  # noqa: BLE001  as in `launch`
            return FailedLaunch(error)
        return handle

    def is_done(self, handle: StepHandle) -> bool:
        """Whether to collect now. True also of a step whose `is_done` raises."""
        try:
            return handle.is_done()
        except Exception:  # noqa: BLE001  collecting it raises the same
            return True

    def collect(self) -> None:
        """Collect the step in flight, if there is one. Raises only errors that no later step could survive."""
        if self.uncollected is None:
            return
        plan, handle = self.uncollected
        self.uncollected = None
        try:
            result = handle.collect()
        except OwnershipError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, other requests go on
            self._fail(plan, error)
            return
        self._num_failed_in_a_row = 0
        self._scheduler.collect(plan, result)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._runner.recover()  # raises if the device is lost; else nothing of the step writes any more
        num_ended = self._scheduler.fail(plan, error)
        self._num_failed_in_a_row += num_ended > 0  # a step whose requests had all ended says nothing about the next
        self.survived.append(error)
        _log.error("step %d failed, %d requests end with an error", plan.step_id, num_ended, exc_info=error)
        if self._num_failed_in_a_row >= _MAX_FAILED_IN_A_ROW:
            raise RuntimeError(f"{_MAX_FAILED_IN_A_ROW} steps in a row have failed") from error
