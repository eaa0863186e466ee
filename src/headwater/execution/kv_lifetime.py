"""KV memory that can be given back and taken again while the engine lives."""

from headwater.devices.device import Device
from headwater.execution.runner import Runner


class KvLifetime:
    """`control.ports.KvMemoryPort` over a runner's KV memory. No step is in flight when it is called."""

    def __init__(self, runner: Runner, device: Device) -> None:
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
