"""What the loop needs from the side that computes.

The server's is `ServedModel` (launch/served_model.py) over a runner of execution/; the simulation has a fake.
"""

from typing import Protocol

from headwater.control.ports import AdaptersPort, KvMemoryPort, WeightsPort
from headwater.scheduling.plan import StepHandle, StepPlan


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

    @property
    def adapters(self) -> AdaptersPort | None:
        """None: LoRA adapters are not served."""
        ...
