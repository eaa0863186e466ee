"""Where the model computes: the device, how much KV fits on it, and the runner that suits it."""

import logging
from typing import TYPE_CHECKING

import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory
from headwater.devices.device import Device
from headwater.devices.kv_memory import KVLayout, num_pages_in_budget
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.runner import Runner
from headwater.execution.warm_up import chunk_sizes, warm_up
from headwater.launch.config import MIB, ServerArgs
from headwater.launch.progress import progress_bar
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel

if TYPE_CHECKING:
    from headwater.devices.cuda.host_memory import PinnedHostMemory
    from headwater.devices.cuda.page_copies import CudaPageCopier

_GIB = 1 << 30
_GRAPH_BYTES = 512 * MIB  # CUDA graphs and what the driver keeps for them
_TABLE_BYTES = 256 * MIB  # page tables, rotary tables, partial results of attention
_GATHERED_BYTES = 256 * MIB  # contexts gathered for attention that knows no pages (devices/cuda/external_attention.py)

_WARM_UP_TOKENS = 128  # of the first step on a CPU
_FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

_log = logging.getLogger(__name__)


def open_device(args: ServerArgs) -> Device:
    """The device that `--device` names; auto: a GPU where there is one. Raises ValueError if there is none."""
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        from headwater.devices.cuda.device import CudaDevice  # imports Triton, which a server on a CPU does without

        return CudaDevice(attention=args.attention_backend)
    if args.attention_backend != "auto":
        raise ValueError(f"--attention-backend {args.attention_backend} needs --device cuda")
    return CpuDevice(num_threads=args.threads)


def kv_dtype(args: ServerArgs, loaded: LoadedModel) -> torch.dtype:
    """What `--kv-cache-dtype` names; auto: the model's."""
    return _FLOAT8.get(args.kv_cache_dtype, loaded.dtype)


def make_runner(args: ServerArgs, loaded: LoadedModel, device: Device, *, num_pages: int, max_context: int) -> Runner:
    """A runner that is warm: kernels compiled, CUDA graphs captured. `args` have the device's defaults."""
    assert args.max_running_requests is not None and args.max_step_tokens is not None
    room = max(min(max_context, num_pages * args.page_size) - 1, 1)
    if device.torch_device.type == "cpu":
        runner = CpuRunner(
            loaded,
            device,
            page_size=args.page_size,
            num_pages=num_pages,
            max_running=args.max_running_requests,
            max_context=max_context,
            kv_dtype=kv_dtype(args, loaded),
        )
        warm_up(runner, sizes=(min(_WARM_UP_TOKENS, room),))
        return runner
    from headwater.devices.cuda.device import CudaDevice  # as above: only where it is used
    from headwater.execution.gpu_runner import GpuRunner
    from headwater.execution.prompt_steps import launch_bound_tokens, prompt_graph_sizes
    from headwater.execution.step_graphs import graph_sizes

    assert isinstance(device, CudaDevice)
    largest = 0 if args.disable_cuda_graph else args.cuda_graph_max_bs or args.max_running_requests
    largest = min(largest, args.max_running_requests)
    max_tokens = 0 if args.disable_cuda_graph else launch_bound_tokens(loaded.weights_bytes // loaded.dtype.itemsize)
    on_gpu = GpuRunner(
        loaded,
        device,
        page_size=args.page_size,
        num_pages=num_pages,
        max_running=args.max_running_requests,
        max_context=max_context,
        kv_dtype=kv_dtype(args, loaded),
        graph_sizes=graph_sizes(largest),
        prompt_graph_sizes=prompt_graph_sizes(max_tokens=min(max_tokens, args.max_step_tokens), max_decodes=largest),
    )
    warm_up(on_gpu, sizes=chunk_sizes(min(args.max_step_tokens, room)))
    with progress_bar("capturing CUDA graphs", on_gpu.num_graphs_missing) as captured:
        on_gpu.capture_graphs(captured)
    free_bytes = device.free_memory_bytes()
    _log.info("%.1f GiB of the GPU's memory are left free", free_bytes / _GIB)
    return on_gpu


def make_host_memory(
    device: Device, runner: Runner, *, num_pages: int, layout: KVLayout
) -> "tuple[HostMemory, CpuPageCopier] | tuple[PinnedHostMemory, CudaPageCopier]":
    """Memory for the host tier, and what copies between it and the runner's KV memory."""
    if device.torch_device.type == "cpu":
        memory = HostMemory(num_pages=num_pages, page_bytes=layout.page_bytes)
        return memory, CpuPageCopier(lambda: runner.kv, memory)
    from headwater.devices.cuda.host_memory import PinnedHostMemory
    from headwater.devices.cuda.page_copies import CudaPageCopier
    from headwater.execution.gpu_runner import GpuRunner

    assert isinstance(runner, GpuRunner)
    pinned = PinnedHostMemory(num_pages=num_pages, page_bytes=layout.page_bytes)
    copier = CudaPageCopier(lambda: runner.kv, pinned, device=device.torch_device)
    runner.arrivals = copier.arrivals
    return pinned, copier


def workspace_bytes(args: ServerArgs, config: ModelConfig, device: Device) -> int:
    """What a step takes on a GPU beside weights and KV, at most; 0 on a CPU, where it is small."""
    if device.torch_device.type == "cpu":
        return 0
    from headwater.devices.cuda.device import CudaDevice

    assert args.max_running_requests is not None and args.max_step_tokens is not None
    # float32 residual, its norm, qkv, attention's output, gate and up, their product; a quarter more for the allocator
    qkv = config.q_size + 2 * config.kv_size
    token_bytes = 4 * config.hidden_size + 2 * (config.hidden_size + qkv + config.q_size + 3 * config.intermediate_size)
    activations = args.max_step_tokens * token_bytes * 5 // 4
    logits = 3 * 4 * args.max_running_requests * config.vocab_size
    gathered = _GATHERED_BYTES if isinstance(device, CudaDevice) and device.external_attention is not None else 0
    return activations + logits + _GRAPH_BYTES + _TABLE_BYTES + gathered


def num_kv_pages(
    args: ServerArgs, layout: KVLayout, *, weights_bytes: int, free_bytes: int, reserved_bytes: int = 0
) -> int:
    """Pages of KV: as asked for in tokens, in MiB, or what is left of a share of the memory.

    The share is of `free_bytes` and `weights_bytes` together; `reserved_bytes` of it are kept for the steps.
    """
    if args.max_total_tokens is not None:
        if args.max_total_tokens < args.page_size:
            raise ValueError(f"--max-total-tokens must be at least one page, {args.page_size} tokens")
        return args.max_total_tokens // args.page_size
    if args.kv_cache_memory_mb is not None:
        return num_pages_in_budget(args.kv_cache_memory_mb * MIB, layout)
    assert args.mem_fraction_static is not None
    budget_bytes = int(args.mem_fraction_static * (free_bytes + weights_bytes)) - weights_bytes - reserved_bytes
    if budget_bytes < layout.page_bytes:
        steps = f", steps need {reserved_bytes / _GIB:.2f} GiB" if reserved_bytes else ""
        raise ValueError(
            f"--mem-fraction-static {args.mem_fraction_static} leaves no room for KV: weights take "
            f"{weights_bytes / _GIB:.2f} GiB{steps}, {free_bytes / _GIB:.2f} GiB of memory are free"
        )
    return num_pages_in_budget(budget_bytes, layout)
