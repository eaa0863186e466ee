"""What the loop needs from the side that computes. The real one is execution/, the simulation has a fake."""

from typing import Protocol

from headwater.control.ports import KvMemoryPort, WeightsPort
from headwater.scheduling.plan import StepPlan, StepResult


class StepHandle(Protocol):
    """A launched step."""

    def is_done(self) -> bool:
        """Whether `collect` would return without waiting."""
        ...

    def collect(self) -> StepResult:
        """Wait for the step and return its result. Called exactly once."""
        ...


class ModelRunner(Protocol):
    """Runs steps in the order they are launched, and owns the memory they need."""

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def recover(self) -> None:
        """After a step that raised: wait until nothing of it runs any more. Raises if the device is lost."""
        ...

    @property
    def weights(self) -> WeightsPort: ...

    @property
    def kv_memory(self) -> KvMemoryPort: ...
