"""A model on an NVIDIA GPU. Importing this module loads Triton."""

import logging
from functools import partial

import torch

from headwater.devices.cpu.ranks.page_share import SharedPages
from headwater.devices.cuda.adapters import CudaAdapters, adapter_bytes
from headwater.devices.cuda.arrivals import Arrivals
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.external_attention import MAX_GATHERED_BYTES
from headwater.devices.cuda.host_memory import PinnedHostMemory, register_with_driver, unregister_with_driver
from headwater.devices.cuda.page_copies import CudaPageCopier
from headwater.devices.cuda.products.coded_linear import CodedLinear
from headwater.devices.cuda.torch_tensors import torch_dtype
from headwater.devices.kv_memory import KVLayout
from headwater.devices.number_formats import STORAGE_TYPES
from headwater.execution.gpu_runner import GpuRunner
from headwater.execution.prompt_steps import launch_bound_tokens, prompt_graph_sizes
from headwater.execution.runner import Runner
from headwater.execution.step_graphs import graph_sizes
from headwater.execution.warm_up import Steps, chunk_sizes, warm_up
from headwater.launch.config import MIB, ServerArgs
from headwater.launch.progress import progress_bar
from headwater.messages.state import GpuKernels
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel
from headwater.models.ranks.adapter_share import adapter_shape
from headwater.models.ranks.share import ModelShare
from headwater.scheduling.speculation.drafters import GPU_LIMITS

_GIB = 1 << 30
_GRAPH_BYTES = 512 * MIB  # CUDA graphs and what the driver keeps for them
_TABLE_BYTES = 256 * MIB  # page tables, rotary tables, partial results of attention

_log = logging.getLogger(__name__)


class CudaPlacement:
    """Builds what suits a GPU (placement.Placement)."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self.arrivals = Arrivals()  # the copier adds restores, the runner's steps wait for them

    def layer_cache(self, args: ServerArgs) -> None:
        """None: a GPU takes weights as they are in the files."""

    def workspace_bytes(self, args: ServerArgs, config: ModelConfig) -> int:
        assert args.max_running_requests is not None and args.max_step_tokens is not None
        # float32 residual, its norm, qkv, attention's output, what an MLP makes; a quarter for the allocator
        qkv = config.q_size + 2 * config.kv_size
        num_halves = config.hidden_size + qkv + config.q_size + _mlp_numbers(config)
        activations = args.max_step_tokens * (4 * config.hidden_size + 2 * num_halves) * 5 // 4
        logits = 3 * 4 * (args.max_running_requests + _max_drafted(args)) * config.vocab_size
        gathered = 0 if self.device.external_attention is None else MAX_GATHERED_BYTES
        adapters = 0
        if args.serves_adapters:
            share = ModelShare.of(self.device.ranks)
            shape = adapter_shape(
                config, num_slots=args.num_adapter_slots + 1, max_rank=args.max_lora_rank, share=share
            )
            form = self.device.auto_dtype() if args.dtype == "auto" else args.dtype
            adapters = adapter_bytes(shape, form=form) + _GRAPH_BYTES  # steps with adapters have graphs of their own
        return activations + logits + _GRAPH_BYTES + _TABLE_BYTES + gathered + adapters

    def make_runner(
        self, args: ServerArgs, loaded: LoadedModel, *, layout: KVLayout, num_pages: int, max_context: int
    ) -> GpuRunner:
        assert args.max_running_requests is not None and args.max_step_tokens is not None
        largest = max_tokens = 0
        if not args.disable_cuda_graph:
            if not args.deterministic:  # else steps of decodes are steps with prompts
                largest = min(args.cuda_graph_max_bs or args.max_running_requests, args.max_running_requests)
            num_weights = loaded.weights_bytes // STORAGE_TYPES[loaded.dtype].itemsize
            is_coded = isinstance(loaded.model.layers[0].o, CodedLinear)
            num_active = int(num_weights * loaded.config.active_share)
            max_tokens = launch_bound_tokens(num_active, is_coded=is_coded, num_ranks=self.device.ranks.size)
        return GpuRunner(
            loaded,
            self.device,
            layout=layout,
            num_pages=num_pages,
            max_running=args.max_running_requests,
            max_context=max_context,
            graph_sizes=graph_sizes(largest),
            prompt_graph_sizes=prompt_graph_sizes(
                max_tokens=min(max_tokens, args.max_step_tokens),
                max_decodes=largest,
                has_drafts=args.speculation != "none",
            ),
            arrivals=self.arrivals,
            adapters=self._adapters(args, loaded),
            max_drafted=_max_drafted(args),
        )

    def _adapters(self, args: ServerArgs, loaded: LoadedModel) -> CudaAdapters | None:
        if not args.serves_adapters:
            return None
        shape = adapter_shape(
            loaded.config, num_slots=args.num_adapter_slots + 1, max_rank=args.max_lora_rank, share=loaded.share
        )
        return CudaAdapters(shape, form=loaded.dtype, device=self.device.torch_device)

    def warm_up(self, args: ServerArgs, runner: Runner, *, steps: Steps, max_context: int) -> None:
        assert args.max_step_tokens is not None
        warm_up(runner, steps=steps, sizes=chunk_sizes(min(args.max_step_tokens, max(max_context - 1, 1))))

    def capture_graphs(self, runner: Runner) -> None:
        assert isinstance(runner, GpuRunner)
        with progress_bar("capturing CUDA graphs", runner.num_graphs_missing) as captured:
            runner.capture_graphs(captured)
        _log.info("%.1f GiB of the GPU's memory are left free", self.device.free_memory_bytes() / _GIB)

    def compute_facts(self, runner: Runner, loaded: LoadedModel, *, steps: Steps) -> None:
        """None: the facts are a CPU's."""

    def gpu_kernels(self, args: ServerArgs, loaded: LoadedModel) -> GpuKernels:
        device, faster = self.device, []
        why = device.why_own_attention(loaded.model.geometry, torch_dtype(loaded.dtype))
        if args.deterministic:
            faster.append("without --deterministic, whose kernels add in a fixed order")
        elif args.attention_backend == "triton":
            faster.append("fa3 for long prompts, which --attention-backend triton turns off")
        elif why:
            faster.append(f"fa3 for long prompts, which {why}")
        if args.disable_cuda_graph:
            faster.append("CUDA graphs, which --disable-cuda-graph turns off")
        external = device.external_attention if why is None else None
        return GpuKernels(device.card, "triton" if external is None else external.name, tuple(faster))

    def make_host_memory(
        self, runner: Runner, *, num_pages: int, shared: SharedPages | None = None
    ) -> tuple[PinnedHostMemory, CudaPageCopier]:
        place, share = self.device.torch_device, None if shared is None else shared.share
        page_bytes = runner.kv.layout.page_bytes if share is None else share.whole.page_bytes
        memory = PinnedHostMemory(
            num_pages=num_pages,
            page_bytes=page_bytes,
            buffer=None if shared is None else shared.buffer,
            register=partial(register_on, place),
            unregister=unregister_with_driver,
        )
        return memory, CudaPageCopier(lambda: runner.kv, memory, device=place, arrivals=self.arrivals, share=share)


def _max_drafted(args: ServerArgs) -> int:
    """The most rows that drafts add to a step."""
    return 0 if args.speculation == "none" else GPU_LIMITS.max_rows


def _mlp_numbers(config: ModelConfig) -> int:
    """Numbers of a token between the layers of an MLP: gate, up and their product; of experts the results as well."""
    experts = config.experts
    routed = 0 if experts is None else experts.per_token * (experts.intermediate_size + config.hidden_size)
    return max(routed, 0 if experts is not None and not experts.dense_layers else 3 * config.intermediate_size)


def register_on(device: torch.device, address: int, num_bytes: int) -> None:
    """Called in threads of the host memory: in a new one the first card is current, where this rank has no memory."""
    torch.cuda.set_device(device)
    register_with_driver(address, num_bytes)
