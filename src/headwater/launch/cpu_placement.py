"""A model on this machine's CPU."""

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory
from headwater.devices.kv_memory import KVLayout
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.runner import Runner
from headwater.execution.warm_up import warm_up
from headwater.launch.config import ServerArgs
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel

_WARM_UP_TOKENS = 128


class CpuPlacement:
    """Builds what suits a CPU (placement.Placement)."""

    def __init__(self, device: CpuDevice) -> None:
        self.device = device

    def workspace_bytes(self, args: ServerArgs, config: ModelConfig) -> int:
        """0: what a step takes is small beside the model."""
        return 0

    def make_runner(
        self, args: ServerArgs, loaded: LoadedModel, *, layout: KVLayout, num_pages: int, max_context: int
    ) -> CpuRunner:
        assert args.max_running_requests is not None
        runner = CpuRunner(
            loaded,
            self.device,
            layout=layout,
            num_pages=num_pages,
            max_running=args.max_running_requests,
            max_context=max_context,
        )
        longest = max(min(max_context, num_pages * layout.page_size) - 1, 1)
        warm_up(runner, sizes=(min(_WARM_UP_TOKENS, longest),))
        return runner

    def make_host_memory(self, runner: Runner, *, num_pages: int) -> tuple[HostMemory, CpuPageCopier]:
        memory = HostMemory(num_pages=num_pages, page_bytes=runner.kv.layout.page_bytes)
        return memory, CpuPageCopier(lambda: runner.kv, memory)
