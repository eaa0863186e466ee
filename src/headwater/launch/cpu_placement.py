"""A model on this machine's CPU."""

from collections import Counter
from collections.abc import Sequence

from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory
from headwater.devices.cpu.kernel_library import kernels_origin
from headwater.devices.cpu.machine_speed import measure_read_gb_s
from headwater.devices.cpu.packed_cache import PackedCache
from headwater.devices.cpu.packed_weights import PackedWeights
from headwater.devices.cpu.ranks.page_share import SharedPages
from headwater.devices.kv_memory import KVLayout
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.runner import Runner
from headwater.execution.warm_up import Steps, time_decode_s, warm_up
from headwater.launch.config import GB, ServerArgs
from headwater.launch.default_model import cache_dir
from headwater.messages.state import ComputeFacts
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel
from headwater.models.ranks.adapter_share import adapter_shape

_WARM_UP_TOKENS = 8  # enough to touch the weights and start the threads
_MEASURED_S = 0.025  # for each of two rates: the start must not wait for them
_LEAST_SHARE = 0.02  # of the weights' bytes; formats of less are not named


class CpuPlacement:
    """Builds what suits a CPU (placement.Placement)."""

    def __init__(self, device: CpuDevice) -> None:
        self.device = device

    def layer_cache(self, args: ServerArgs) -> PackedCache | None:
        max_bytes = int(args.weights_cache_size * GB)
        try:
            return self.device.packed_cache(cache_dir() / "packed", max_bytes=max_bytes) if max_bytes else None
        except RuntimeError:  # the user has no home
            return None

    def workspace_bytes(self, args: ServerArgs, config: ModelConfig) -> int:
        """0: what a step takes is small beside the model."""
        return 0

    def make_runner(
        self, args: ServerArgs, loaded: LoadedModel, *, layout: KVLayout, num_pages: int, max_context: int
    ) -> CpuRunner:
        assert args.max_running_requests is not None
        return CpuRunner(
            loaded,
            self.device,
            layout=layout,
            num_pages=num_pages,
            max_running=args.max_running_requests,
            max_context=max_context,
            adapters=self._adapters(args, loaded),
        )

    def _adapters(self, args: ServerArgs, loaded: LoadedModel) -> CpuAdapters | None:
        if not args.serves_adapters:
            return None
        shape = adapter_shape(
            loaded.config, num_slots=args.num_adapter_slots + 1, max_rank=args.max_lora_rank, share=loaded.share
        )
        return CpuAdapters(self.device.library, shape, form=loaded.dtype)

    def warm_up(self, args: ServerArgs, runner: Runner, *, steps: Steps, max_context: int) -> None:
        warm_up(runner, steps=steps, sizes=(min(_WARM_UP_TOKENS, max(max_context - 1, 1)),))

    def capture_graphs(self, runner: Runner) -> None:
        """A CPU has none."""

    def compute_facts(self, runner: Runner, loaded: LoadedModel, *, steps: Steps) -> ComputeFacts:
        assert isinstance(runner, CpuRunner)
        library, packed = self.device.library, runner.packed_weights
        read_gb_s, num_threads = 0.0, self.device.num_threads
        if library is not None:
            blocks = [each.blocks.reshape(-1) for each in packed]
            read_gb_s = measure_read_gb_s(library, blocks, num_threads=num_threads, limit_s=_MEASURED_S)
        return ComputeFacts(
            instruction_set="" if library is None else library.isa.name,
            kernels=kernels_origin(),
            num_threads=num_threads,
            is_pinned=self.device.is_pinned,
            weight_formats=_formats_by_bytes(packed) or (loaded.dtype,),
            is_quantized_here=bool(loaded.form.quantised),
            token_bytes=sum(each.nbytes for each in packed),
            read_gb_s=read_gb_s,
            decode_s=time_decode_s(steps, limit_s=_MEASURED_S),
        )

    def gpu_kernels(self, args: ServerArgs, loaded: LoadedModel) -> None:
        """None: there is no GPU."""

    def make_host_memory(
        self, runner: Runner, *, num_pages: int, shared: SharedPages | None = None
    ) -> tuple[HostMemory, CpuPageCopier]:
        if shared is None:
            memory = HostMemory(num_pages=num_pages, page_bytes=runner.kv.layout.page_bytes)
            return memory, CpuPageCopier(lambda: runner.kv, memory)
        memory = HostMemory(num_pages=num_pages, page_bytes=shared.share.whole.page_bytes, buffer=shared.buffer)
        return memory, CpuPageCopier(lambda: runner.kv, memory, share=shared.share)


def _formats_by_bytes(weights: Sequence[PackedWeights]) -> tuple[str, ...]:
    num_bytes: Counter[str] = Counter()
    for each in weights:
        num_bytes[each.format] += each.nbytes
    return tuple(name for name, size in num_bytes.most_common() if size >= _LEAST_SHARE * num_bytes.total())
