"""The CPU as a device: models record programs (program.py), which run in compiled kernels, or in numpy without them."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.attention_kernels import MAX_STACKED, WorkList, work_list
from headwater.devices.cpu.draws import Draws, Masks, best_allowed, draw_tokens
from headwater.devices.cpu.experts.packed import PackedExperts
from headwater.devices.cpu.experts.plain import PlainExperts
from headwater.devices.cpu.kernel_library import KernelLibrary, usable_kernels
from headwater.devices.cpu.kv_memory import CpuKVMemory
from headwater.devices.cpu.packed_cache import PackedCache
from headwater.devices.cpu.packed_layers import PackedGatedLinear, PackedLinear, fuse_activations
from headwater.devices.cpu.packed_weights import FORMATS, has_tiles
from headwater.devices.cpu.plain_layers import PlainGatedLinear, PlainLinear
from headwater.devices.cpu.program import Array, Program
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.ops import add_reduced, all_reduce
from headwater.devices.cpu.recorded_attention import RecordedAttention
from headwater.devices.cpu.row_ops import add_rms_norm, rms_norm
from headwater.devices.cpu.topology import free_memory_bytes, num_usable_cores
from headwater.devices.device import (
    Activation,
    AttentionGeometry,
    ExpertBiases,
    Experts,
    GatedLinear,
    Layer,
    Linear,
    RotaryAngles,
    Routing,
)
from headwater.devices.errors import UnsupportedError
from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor, RandomTensor
from headwater.devices.kv_memory import KVLayout
from headwater.devices.rank_group import SOLE_RANK, RankGroup
from headwater.devices.scaled_tensor import ScaledTensor


class CpuDevice:
    """This machine's CPU (device.Device). Weights are host tensors, and activations are a program's arrays."""

    name = "cpu"

    def __init__(
        self,
        *,
        num_threads: int | None = None,
        use_kernels: bool = True,
        cpus: Sequence[Sequence[int]] = (),
        ranks: CpuRanks | None = None,
    ) -> None:
        """`cpus[i]`: where thread i may run, if the threads are to be pinned. `ranks`: None for a single process."""
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, found {num_threads}")
        self.num_threads = num_threads or num_usable_cores()
        self._library = usable_kernels() if use_kernels else None
        self.cpu_ranks = ranks
        self.is_pinned = bool(cpus) and self._library is not None
        if self._library is not None and cpus:
            self._library.pin_threads(cpus)

    @property
    def library(self) -> KernelLibrary | None:
        return self._library

    @property
    def ranks(self) -> RankGroup:
        return self.cpu_ranks or SOLE_RANK

    # --- models --------------------------------------------------------------------------------------

    @property
    def block_formats(self) -> frozenset[str]:
        is_packed = self._library is not None
        return frozenset(form for form in FORMATS if form not in STORAGE_TYPES) if is_packed else frozenset()

    @property
    def is_deterministic(self) -> bool:
        """Whether a row's bits depend neither on other rows nor on how its tokens are cut into steps.

        AMX tiles take a prompt's rows, other kernels a decode's. numpy's sums depend on the place of a row.
        """
        return self._library is not None and not has_tiles(self._library)

    def auto_dtype(self) -> str:
        return "float32" if self._library is None else "bfloat16"

    @property
    def expert_formats(self) -> frozenset[str]:
        return self.block_formats

    def holds(self, weight: ScaledTensor) -> bool:
        return False  # GGUF's blocks of the same numbers are computed with

    def place(self, weight: HostTensor | ScaledTensor | RandomTensor, *, form: str) -> HostTensor:
        assert not isinstance(weight, ScaledTensor), "it is not held here"
        host = weight.to_host() if isinstance(weight, RandomTensor) else weight
        return host if host.format == form else host.astype(form)

    def rounded(self, array: HostTensor) -> HostTensor:
        raise UnsupportedError("quantization", "fp8", "needs a GPU: a CPU has no products with float8")

    def to_host(self, array: HostTensor, *, max_rows: int | None = None) -> HostTensor:
        return array if max_rows is None else array.rows(0, max_rows)

    def packing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def open_shared(self, handle: Sequence[Any]) -> None:
        return None

    def take(self, shared: Any, first: int, *, format: str, shape: tuple[int, ...], form: str) -> HostTensor:
        raise NotImplementedError("nothing was opened")

    def overwrite(self, pairs: Iterable[tuple[HostTensor, HostTensor]]) -> bool:
        return False

    def pack_linear(self, weights: Sequence[HostTensor], biases: Sequence[HostTensor] | None = None) -> Linear:
        if self._library is None:
            return PlainLinear(weights, biases)
        return PackedLinear.of(self._library, weights, biases, num_threads=self.num_threads)

    def pack_gated_linear(
        self,
        gate: HostTensor,
        up: HostTensor,
        *,
        gate_bias: HostTensor | None = None,
        up_bias: HostTensor | None = None,
        activation: Activation = "silu",
        is_fused: bool = False,
    ) -> GatedLinear:
        if self._library is None:
            return PlainGatedLinear((gate, gate_bias), (up, up_bias), activation=activation, is_fused=is_fused)
        return PackedGatedLinear.of(
            self._library,
            gate,
            up,
            gate_bias=gate_bias,
            up_bias=up_bias,
            num_threads=self.num_threads,
            activation=activation,
            is_fused=is_fused,
        )

    def pack_fused_gated_linear(self, gate_up: HostTensor, *, activation: Activation = "silu") -> GatedLinear:
        size = gate_up.shape[0] // 2
        gate, up = gate_up.rows(0, size), gate_up.rows(size, 2 * size)
        return self.pack_gated_linear(gate, up, activation=activation, is_fused=True)

    def pack_experts(
        self,
        experts: Iterable[tuple[HostTensor, HostTensor, HostTensor]],
        *,
        num_experts: int,
        routing: Routing,
        biases: ExpertBiases | None = None,
        activation: Activation = "silu",
    ) -> Experts:
        if self._library is None:
            return PlainExperts(experts, routing=routing, biases=biases, activation=activation)
        return PackedExperts.of(
            self._library,
            experts,
            num_experts=num_experts,
            routing=routing,
            num_threads=self.num_threads,
            biases=biases,
            activation=activation,
        )

    def packed_cache(self, folder: Path, *, max_bytes: int) -> PackedCache | None:
        """The packed weights that are kept in `folder`; None without kernels, which alone need packed weights."""
        return None if self._library is None else PackedCache(folder, max_bytes=max_bytes, library=self._library)

    def rms_norm(
        self,
        residual: Array,
        weight: HostTensor,
        eps: float,
        *,
        offset: float = 0.0,
        scale: float = 1.0,
        reader: Layer | None = None,
    ) -> Array:
        return rms_norm(residual, weight, eps, offset=offset, scale=scale)

    def add_and_norm(
        self,
        block: Layer,
        residual: Array,
        inputs: Sequence[Array],
        weight: HostTensor,
        eps: float,
        *,
        offset: float = 0.0,
        reader: Layer | None = None,
    ) -> Array:
        block.add_to(residual, *inputs)
        return rms_norm(residual, weight, eps, offset=offset)

    def add_rms_norm(self, residual: Array, x: Array, weight: HostTensor, eps: float, *, offset: float = 0.0) -> None:
        add_rms_norm(residual, x, weight, eps, offset=offset)

    def without_norm(self, residual: Array, like: HostTensor) -> Array:
        return residual

    def all_reduce(self, x: Array) -> Array:
        return x if self.cpu_ranks is None else all_reduce(x, self.cpu_ranks)

    def add_reduced(self, residual: Array, x: Array) -> None:
        assert self.cpu_ranks is not None, "a single process adds to the residual within the product"
        add_reduced(residual, x, self.cpu_ranks)

    # --- steps ---------------------------------------------------------------------------------------

    def start_program(self) -> Program:
        raise_failure = None if self.cpu_ranks is None else self.cpu_ranks.raise_failure
        return Program(self._library, num_threads=self.num_threads, raise_failure=raise_failure)

    def finish_program(self, program: Program) -> None:
        """Make what is recorded faster. Called once, before the program runs."""
        if self._library is not None and has_tiles(self._library):
            program.rewrite(fuse_activations)

    def record_attention(
        self, program: Program, geometry: AttentionGeometry, layout: KVLayout, *, rotary: Sequence[RotaryAngles]
    ) -> RecordedAttention:
        return RecordedAttention(program, geometry, layout, rotary=rotary, ranks=self.cpu_ranks)

    def attention_work(
        self,
        geometry: AttentionGeometry,
        query_starts: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        *,
        page_tables: npt.NDArray[np.int32],
        page_size: int,
        num_decodes: int,
    ) -> WorkList:
        """How a step's attention is cut into chunks for the threads. What decodes share is computed once for all."""
        return work_list(
            query_starts,
            context_lens,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            num_threads=self.num_threads,
            page_tables=page_tables,
            page_size=page_size,
            num_decodes=num_decodes,
            max_stacked=MAX_STACKED if self._library is None else self._library.max_stacked,
        )

    def draw(self, logits: npt.NDArray[np.float32], draws: Draws) -> npt.NDArray[np.int32]:
        return draw_tokens(logits, draws, library=self._library, num_threads=self.num_threads)

    def best_allowed(
        self,
        logits: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32],
        *,
        masks: Masks,
        mask_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.int32]:
        """The most probable token of each of some rows that its mask allows. int32[rows]"""
        return best_allowed(
            logits, rows, masks=masks, mask_rows=mask_rows, library=self._library, num_threads=self.num_threads
        )

    def free_memory_bytes(self) -> int:
        return free_memory_bytes()

    def trim_memory(self) -> None:
        """Nothing to do: freed arrays return their memory."""

    def allocate_kv(self, layout: KVLayout, num_pages: int) -> CpuKVMemory:
        return CpuKVMemory(layout, num_pages)
