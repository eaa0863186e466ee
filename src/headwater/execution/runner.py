"""What the weights, the KV memory and the warm-up need from a runner. CpuRunner and GpuRunner implement it."""

from typing import Protocol

from headwater.devices.kv_memory import KVMemory
from headwater.models.decoder import DecoderModel
from headwater.scheduling.plan import StepHandle, StepPlan


class Runner(Protocol):
    """Runs steps with a model and KV memory that can be replaced between two steps."""

    @property
    def model(self) -> DecoderModel: ...

    @property
    def has_model(self) -> bool: ...

    @property
    def kv(self) -> KVMemory: ...

    def replace_model(self, model: DecoderModel | None) -> None:
        """Compute with `model` from the next step on; None: give the weights' memory back."""
        ...

    def replace_kv(self, kv: KVMemory | None) -> None:
        """Keep keys and values in `kv` from the next step on; None: give the memory back."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """What the model and its KV take, for EngineState."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def recover(self) -> None:
        """After a step that raised: wait until nothing of it runs any more. Raises if the device is lost."""
        ...
