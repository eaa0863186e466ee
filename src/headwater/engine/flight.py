"""The step in flight."""

from headwater.engine.ports import StepHandle
from headwater.scheduling.plan import StepPlan


class Flight:
    """At most one launched step that has not been collected. The loop writes it, the control plane asks."""

    def __init__(self) -> None:
        self.step: tuple[StepPlan, StepHandle] | None = None

    def is_step_in_flight(self) -> bool:
        return self.step is not None
