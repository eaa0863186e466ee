"""What the weights, the KV memory and the warm-up need from a runner. CpuRunner and GpuRunner implement it."""

from typing import Protocol

from headwater.devices.adapters import AdapterMemory
from headwater.devices.device import RunnerDevice
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

    @property
    def adapters(self) -> AdapterMemory | None:
        """The memory of LoRA adapters; None: no row may have one."""
        ...

    def replace_model(self, model: DecoderModel | None) -> None:
        """Compute with `model` from the next step on; None: free the weights' memory."""
        ...

    def replace_kv(self, kv: KVMemory | None) -> None:
        """Keep keys and values in `kv` from the next step on; None: free the memory."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the model and its KV, for EngineState."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def recover(self) -> None:
        """After a step that raised: wait until nothing of it runs. Raises if the device is lost."""
        ...


class KvLifetime:
    """A runner's KV memory (`control.ports.KvMemoryPort`), released and allocated again while no step is in flight."""

    def __init__(self, runner: Runner, device: RunnerDevice) -> None:
        self._runner = runner
        self._device = device
        self._layout, self._num_pages = runner.kv.layout, runner.kv.num_pages

    def release(self) -> int:
        num_bytes = self._runner.kv.num_bytes
        self._runner.replace_kv(None)
        self._device.trim_memory()
        return num_bytes

    def resume(self) -> int:
        kv = self._device.allocate_kv(self._layout, self._num_pages)
        self._runner.replace_kv(kv)
        return kv.num_bytes
