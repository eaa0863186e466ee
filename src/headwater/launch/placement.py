"""Where the model computes: the device, what is built on it, and how much KV fits there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from headwater.cache.copier import PageCopier
from headwater.cache.host_tier import HostPages
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.page_share import SharedPages
from headwater.devices.cpu.thread_plan import confine_process
from headwater.devices.cuda.driver import has_gpu
from headwater.devices.device import Device
from headwater.devices.errors import UnsupportedError
from headwater.devices.kv_memory import KVLayout, num_pages_in_budget
from headwater.devices.rank_group import RankGroup
from headwater.execution.runner import Runner
from headwater.execution.warm_up import Steps
from headwater.launch.config import MIB, ServerArgs
from headwater.launch.cpu_placement import CpuPlacement
from headwater.messages.state import ComputeFacts, GpuKernels
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel
from headwater.models.weights import LayerCache

_GIB = 1 << 30
# a small model's server stays below 0.7 GB; a large model holds a long conversation
_CPU_KV_BYTES, _CPU_KV_TOKENS = 352 * MIB, 8192
_FLOAT8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
# the devices' parameters as the command line spells them, and what else a user may choose
_FLAGS = {"device": "--device", "attention": "--attention-backend", "kv_dtype": "--kv-cache-dtype"}
_SPELLED = {dtype: name for name, dtype in _FLOAT8.items()}
_REMEDIES = {"kv_dtype": ": take auto or fp8_e5m2"}


class HostMemory(HostPages, Protocol):
    """The pages of the host tier."""

    @property
    def num_ready_pages(self) -> int:
        """Pages, from the first on, that copies reach by now."""
        ...

    def close(self) -> None:
        """Give the memory back. No copy may be in flight."""
        ...


class Copier(PageCopier, Protocol):
    """What moves pages between the host tier and the runner's KV memory."""

    def close(self) -> None:
        """Carry out what was asked for, and end the threads."""
        ...


class Placement(Protocol):
    """A device, and what is built differently on each: cpu_placement.py and cuda_placement.py."""

    @property
    def device(self) -> Device: ...

    def layer_cache(self, args: ServerArgs) -> LayerCache | None:
        """Where packed weights are kept from start to start; None: nowhere."""
        ...

    def workspace_bytes(self, args: ServerArgs, config: ModelConfig) -> int:
        """The most memory that steps take beside weights and KV. `args` have the device's defaults."""
        ...

    def make_runner(
        self, args: ServerArgs, loaded: LoadedModel, *, layout: KVLayout, num_pages: int, max_context: int
    ) -> Runner:
        """A runner whose first step would be slow (`warm_up`). `args` have the device's defaults."""
        ...

    def warm_up(self, args: ServerArgs, runner: Runner, *, steps: Steps, max_context: int) -> None:
        """Compile kernels. `steps` launches steps on the runner and on all other ranks; `max_context`: the runner's."""
        ...

    def capture_graphs(self, runner: Runner) -> None:
        """Capture CUDA graphs after `warm_up`. All ranks do so at the same time."""
        ...

    def compute_facts(self, runner: Runner, loaded: LoadedModel, *, steps: Steps) -> ComputeFacts | None:
        """How the warm `runner` computes, measured in less than 0.1 s for a small model; None on a GPU."""
        ...

    def gpu_kernels(self, args: ServerArgs, loaded: LoadedModel) -> GpuKernels | None:
        """Which kernels compute, and what keeps faster ones from it; None on a CPU."""
        ...

    def make_host_memory(
        self, runner: Runner, *, num_pages: int, shared: SharedPages | None = None
    ) -> tuple[HostMemory, Copier]:
        """Memory for the host tier, and what copies between it and the runner's KV memory.

        `shared`: whole pages that several ranks hold the heads of.
        """
        ...


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """What a device refuses is reported as the ValueError of a command-line flag."""
    try:
        yield
    except UnsupportedError as error:
        flag, value = _FLAGS[error.parameter], _SPELLED.get(error.value, error.value)
        raise ValueError(f"{flag} {value} {error.reason}{_REMEDIES.get(error.parameter, '')}") from error


@flags_in_errors()
def open_placement(
    args: ServerArgs, *, cpus: Sequence[Sequence[int]] = (), ranks: RankGroup | None = None, gpu: int | None = None
) -> Placement:
    """On the device that `--device` names; auto: a GPU where there is one. Raises ValueError if there is none.

    `cpus[i]`: where thread i of a CPU's computing threads is kept, if they are to be pinned. The whole process moves to
    these CPUs, so that its memory lies beside them. `ranks`: this process as one of several ranks. `gpu`: the number of
    the GPU; None: PyTorch's current one, or that of the rank.
    """
    if args.device == "cuda" or (args.device == "auto" and has_gpu()):
        return _open_gpu(args, ranks, gpu)
    if args.attention_backend != "auto":
        raise ValueError(f"--attention-backend {args.attention_backend} needs --device cuda")
    assert ranks is None or isinstance(ranks, CpuRanks)
    confine_process(cpu for core in cpus for cpu in core)
    device = CpuDevice(num_threads=args.threads, cpus=cpus, ranks=ranks)
    if args.deterministic and not device.is_deterministic:
        why = "needs the compiled kernels: numpy's sums depend on the batch"
        if device.library is not None:
            why = "does not go with AMX, whose tiles round otherwise: HEADWATER_CPU_ISA=avx512_bf16 does without"
        raise ValueError(f"--deterministic {why}")
    return CpuPlacement(device)


def _open_gpu(args: ServerArgs, ranks: RankGroup | None, gpu: int | None) -> Placement:
    """Imports PyTorch and Triton, which a server on a CPU does without."""
    try:
        import torch

        from headwater.devices.cuda.device import CudaDevice
        from headwater.devices.cuda.ranks.group import CudaRanks
        from headwater.launch.cuda_placement import CudaPlacement
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--device cuda needs PyTorch and Triton, and {error.name} is not installed: "
            "pip install 'headwater[gpu]' (in a clone: GPU=1 make setup)"
        ) from error
    assert ranks is None or isinstance(ranks, CudaRanks)
    check_deterministic(args)
    torch_device = None
    if gpu is not None:
        torch_device = torch.device("cuda", gpu)
        torch.cuda.set_device(torch_device)  # kernels are launched on the thread's current GPU
    device = CudaDevice(
        torch_device, attention=args.attention_backend, ranks=ranks, is_deterministic=args.deterministic
    )
    return CudaPlacement(device)


def check_deterministic(args: ServerArgs) -> None:
    """ValueError if `--deterministic` was asked for with what cannot keep its promise on a GPU."""
    for flag, is_given in (("--tp-size", args.tp_size > 1), ("--enable-lora", args.serves_adapters)):
        if args.deterministic and is_given:
            raise ValueError(f"--deterministic does not go with {flag} on a GPU: its sums depend on the rows of a step")


def kv_dtype(args: ServerArgs) -> str | None:
    """What `--kv-cache-dtype` names; None for auto: the model's own."""
    return _FLOAT8.get(args.kv_cache_dtype)


def num_kv_pages(
    args: ServerArgs,
    layout: KVLayout,
    *,
    max_context: int,
    weights_bytes: int,
    free_bytes: int,
    reserved_bytes: int = 0,
) -> int:
    """Pages of KV: as asked for in tokens, in MiB, or what is left of a share of the memory; else a CPU's default.

    The share is of `free_bytes` and `weights_bytes` together; `reserved_bytes` of it are kept for the steps.
    """
    if args.max_total_tokens is not None:
        if args.max_total_tokens < args.page_size:
            raise ValueError(f"--max-total-tokens must be at least one page, {args.page_size} tokens")
        return args.max_total_tokens // args.page_size
    if args.kv_cache_memory_mb is not None:
        return num_pages_in_budget(args.kv_cache_memory_mb * MIB, layout)
    if args.mem_fraction_static is None:
        num_tokens = min(_CPU_KV_TOKENS, max_context)
        return max(_CPU_KV_BYTES // layout.page_bytes, -(-num_tokens // layout.page_size))
    budget_bytes = int(args.mem_fraction_static * (free_bytes + weights_bytes)) - weights_bytes - reserved_bytes
    if budget_bytes < layout.page_bytes:
        steps = f", steps need {reserved_bytes / _GIB:.2f} GiB" if reserved_bytes else ""
        raise ValueError(
            f"--mem-fraction-static {args.mem_fraction_static} leaves no room for KV: weights take "
            f"{weights_bytes / _GIB:.2f} GiB{steps}, {free_bytes / _GIB:.2f} GiB of memory are free"
        )
    return num_pages_in_budget(budget_bytes, layout)
