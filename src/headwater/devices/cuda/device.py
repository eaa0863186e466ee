"""An NVIDIA GPU as a device: cuBLAS for the products, our own Triton kernels for everything else."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cuda.attention import TritonStepAttention
from headwater.devices.cuda.experts import CudaExperts
from headwater.devices.cuda.external_attention import (
    MIN_EXTERNAL_TOKENS,
    AttentionBackend,
    num_own_chunks,
    open_external_attention,
)
from headwater.devices.cuda.kernels.decode import DecodeScratch
from headwater.devices.cuda.kernels.layers import add_rms_norm
from headwater.devices.cuda.kernels.prefill import PrefillScratch, queries_per_tile
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.paged_batch import PagedBatch, RotaryTables
from headwater.devices.cuda.prefill_tiles import PrefillTiles, plan_tiles
from headwater.devices.cuda.products.coded_linear import CodedLinear, Weight
from headwater.devices.cuda.products.coded_matrix import (
    CodedMatrix,
    can_hold,
    can_round,
    codes_to_host,
    place_codes,
    round_to_float8,
)
from headwater.devices.cuda.products.gated_linear import CudaGatedLinear
from headwater.devices.cuda.products.gguf_codes import GGUF_FORMATS, place_blocks
from headwater.devices.cuda.products.linear import CudaLinear
from headwater.devices.cuda.products.mxfp4_matrix import MXFP4, Mxfp4Matrix, Stack, mxfp4_to_host, place_mxfp4
from headwater.devices.cuda.products.placed import is_alike, tensors_of
from headwater.devices.cuda.ranks.group import CudaRanks
from headwater.devices.cuda.read_norm import add_and_read_norm, read_norm
from headwater.devices.cuda.torch_tensors import open_shared, place_tensor, to_host, torch_dtype
from headwater.devices.device import (
    Activation,
    AttentionGeometry,
    ExpertBiases,
    Experts,
    GatedLinear,
    RotaryAngles,
    Routing,
    StepAttention,
)
from headwater.devices.errors import UnsupportedError
from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.devices.rank_group import SOLE_RANK, RankGroup
from headwater.devices.scaled_tensor import ScaledTensor

# 16-bit floats need the tensor cores of this generation at least (Ampere)
_MIN_CAPABILITY = (8, 0)
_MIN_CAPABILITY_E4M3 = (8, 9)  # Ada; Ampere converts from float8_e5m2 only
_MAX_HEAD_DIM = 256
_log = logging.getLogger(__name__)
_INTERPRETED_PROGRAMS = 16  # small, yet enough for the tests to see prompts' attention in pieces


class CudaDevice:
    """One GPU (device.Device). `attention` names the kernels of long prompts; all others are our own.

    UnsupportedError if there is no GPU, if it is too old, or if it cannot run the kernels that `attention` names. If
    `torch_device` is a CPU, the same code runs under Triton's interpreter, for tests. `is_deterministic`: a row's bits
    depend neither on the other rows of its step nor on how its tokens are cut into steps (docs/deterministic.md).
    """

    name = "cuda"

    def __init__(
        self,
        torch_device: torch.device | None = None,
        *,
        attention: AttentionBackend = "triton",
        ranks: CudaRanks | None = None,
        is_deterministic: bool = False,
    ) -> None:
        if is_deterministic:
            assert ranks is None, "how ranks add up depends on the rows of a step"
            if attention == "fa3":
                raise UnsupportedError("attention", attention, "does not go with --deterministic: its sums vary")
            attention = "triton"
        self.is_deterministic = is_deterministic
        self.cuda_ranks = ranks
        if ranks is not None:
            torch_device = ranks.torch_device
        if torch_device is None:
            if not torch.cuda.is_available():
                raise UnsupportedError(
                    "device", self.name, "needs an NVIDIA GPU and a build of PyTorch with CUDA; found none"
                )
            torch_device = torch.device("cuda")
        if torch_device.type == "cuda" and torch_device.index is None:
            torch_device = torch.device("cuda", torch.cuda.current_device())
        self.torch_device = torch_device
        self._backend: AttentionBackend = attention
        self.external_attention, self._why_own_attention = open_external_attention(attention, torch_device)
        self.min_external_tokens = MIN_EXTERNAL_TOKENS
        self.is_gpu = torch_device.type == "cuda"
        self._scratch: DecodeScratch | None = None  # sized by the largest batch seen
        self._max_scratch_rows = 0
        self._prefill_scratch: PrefillScratch | None = None
        self._packing_stream: torch.cuda.Stream | None = None
        # two programs of prompts' attention fit in a multiprocessor
        self._num_programs = (
            2 * torch.cuda.get_device_properties(torch_device).multi_processor_count
            if self.is_gpu
            else _INTERPRETED_PROGRAMS
        )
        if self.is_gpu and (found := torch.cuda.get_device_capability(torch_device)) < _MIN_CAPABILITY:
            raise UnsupportedError("device", self.name, _too_old(torch_device, found, needed=_MIN_CAPABILITY))

    @property
    def ranks(self) -> RankGroup:
        return self.cuda_ranks or SOLE_RANK

    def auto_dtype(self) -> str:
        return "bfloat16"

    @property
    def block_formats(self) -> frozenset[str]:
        has_float8 = not self.is_gpu or torch.cuda.get_device_capability(self.torch_device) >= _MIN_CAPABILITY_E4M3
        return GGUF_FORMATS | {"int4", "int8"} | ({"float8_e4m3fn"} if has_float8 else set())

    @property
    def expert_formats(self) -> frozenset[str]:
        return frozenset({MXFP4})

    def holds(self, weight: ScaledTensor) -> bool:
        return weight.format in self.block_formats and can_hold(weight)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.cuda_ranks is None else self.cuda_ranks.all_reduce(x)

    def add_reduced(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        assert self.cuda_ranks is not None, "a single process adds to the residual within the product"
        self.cuda_ranks.add_reduced(residual, x)

    def place(self, weight: HostTensor | ScaledTensor | RandomTensor, *, form: str) -> Any:
        """A `Weight`, or of an expert one of its `Stack`."""
        if isinstance(weight, ScaledTensor):
            return place_codes(weight, self.torch_device)
        if form == MXFP4:
            assert isinstance(weight, HostTensor)
            return place_mxfp4(weight, self.torch_device)
        if form in GGUF_FORMATS:
            assert isinstance(weight, HostTensor) and weight.format == form
            return place_blocks(weight, self.torch_device)
        return place_tensor(weight, dtype=form, device=self.torch_device)

    def rounded(self, array: Weight) -> Weight:
        is_coded = isinstance(array, CodedMatrix)
        return round_to_float8(array) if not is_coded and can_round(array.shape) else array

    def to_host(self, array: Weight | Mxfp4Matrix, *, max_rows: int | None = None) -> HostTensor | ScaledTensor:
        if isinstance(array, Mxfp4Matrix):
            return mxfp4_to_host(array if max_rows is None else array[:max_rows])
        if isinstance(array, CodedMatrix):
            return codes_to_host(array if max_rows is None else array.rows(0, min(max_rows, array.shape[0])))
        return to_host(array, max_rows=max_rows)

    def free_memory_bytes(self) -> int:
        """Memory that the driver reports as free once PyTorch's allocator has returned its unused memory."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def trim_memory(self) -> None:
        if self.is_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for everything that was launched. After a sticky error of the GPU it raises that again."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)

    def enter_thread(self) -> None:
        """Make this GPU the current one of the calling thread."""
        if self.is_gpu:
            torch.cuda.set_device(self.torch_device)

    def allocate_kv(self, layout: KVLayout, num_pages: int) -> CudaKVMemory:
        return CudaKVMemory(
            layout, torch.empty((num_pages, layout.page_bytes), dtype=torch.uint8, device=self.torch_device)
        )

    @contextmanager
    def packing(self) -> Iterator[None]:
        """On a stream of its own: steps would wait for copies of a gigabyte from host memory."""
        if not self.is_gpu:
            yield
            return
        self.enter_thread()
        if self._packing_stream is None:
            self._packing_stream = torch.cuda.Stream(self.torch_device)
        with torch.cuda.stream(self._packing_stream):
            yield
            self._packing_stream.synchronize()

    def open_shared(self, handle: Sequence[Any]) -> torch.Tensor | None:
        try:
            found = open_shared(handle)
        except Exception:  # noqa: BLE001  the owner has ended, or PyTorch cannot: there is a file as well
            _log.warning("tensors in another process's GPU memory cannot be opened", exc_info=True)
            return None
        return found if found.device == self.torch_device else None

    def take(self, shared: torch.Tensor, first: int, *, format: str, shape: tuple[int, ...], form: str) -> torch.Tensor:
        dtype = torch_dtype(format)
        part = shared[first : first + math.prod(shape) * dtype.itemsize]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()
        return part.view(dtype).reshape(shape).to(torch_dtype(form), copy=True)

    @torch.inference_mode()
    def overwrite(self, pairs: Iterable[tuple[Weight | Mxfp4Matrix, Weight | Mxfp4Matrix]]) -> bool:
        """CUDA graphs stay as they are: to capture them anew takes longer than any copy within the card.

        False if a new matrix is coded in another way than the one in its place: the model must be replaced.
        """
        found = list(pairs)
        if any(not is_alike(target, source) for target, source in found):
            return False
        for target, source in found:
            for into, out_of in zip(tensors_of(target), tensors_of(source), strict=True):
                if into.data_ptr() != out_of.data_ptr():
                    into.copy_(out_of, non_blocking=True)
        self.synchronize()
        return True

    def pack_linear(
        self, weights: Sequence[Weight], biases: Sequence[torch.Tensor] | None = None
    ) -> CudaLinear | CodedLinear:
        plain = [weight for weight in weights if isinstance(weight, torch.Tensor)]
        if len(plain) < len(weights):
            return CodedLinear(weights, biases, is_deterministic=self.is_deterministic)
        return CudaLinear(plain, biases, is_deterministic=self.is_deterministic)

    def pack_gated_linear(
        self,
        gate: Weight,
        up: Weight,
        *,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        activation: Activation = "silu",
    ) -> GatedLinear:
        biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
        return CudaGatedLinear(self.pack_linear((gate, up), biases), activation=activation)

    def pack_fused_gated_linear(self, gate_up: Weight, *, activation: Activation = "silu") -> GatedLinear:
        return CudaGatedLinear(self.pack_linear((gate_up,)), activation=activation)

    def pack_experts(
        self,
        experts: Iterable[tuple[Stack, Stack, Stack]],
        *,
        num_experts: int,
        routing: Routing,
        biases: ExpertBiases | None = None,
        activation: Activation = "silu",
    ) -> Experts:
        return CudaExperts.of(
            experts,
            num_experts=num_experts,
            routing=routing,
            is_deterministic=self.is_deterministic,
            biases=biases,
            activation=activation,
        )

    def rotary_tables(self, rotary: Sequence[RotaryAngles], num_positions: int) -> RotaryTables:
        """cos and sin of each position's angles."""
        cos, sin = [], []
        for angles in rotary:
            inv_freq, factors = (torch.from_numpy(it).to(self.torch_device) for it in (angles.inv_freq, angles.factors))
            found = torch.arange(num_positions, device=self.torch_device).to(torch.float32)[:, None] * inv_freq
            cos.append(found.cos() * factors)
            sin.append(found.sin() * factors)
        return tuple(cos), tuple(sin)

    rms_norm = staticmethod(read_norm)
    add_and_norm = staticmethod(add_and_read_norm)
    add_rms_norm = staticmethod(add_rms_norm)

    def without_norm(self, residual: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return residual.to(like.dtype)

    def check_attention(self, geometry: AttentionGeometry, dtype: torch.dtype, *, kv_dtype: str | None = None) -> None:
        """ValueError for heads that the kernels do not take, UnsupportedError for a KV dtype or a named backend.

        `dtype` is the activations'.
        """
        if geometry.head_dim > _MAX_HEAD_DIM:
            raise ValueError(f"heads of {geometry.head_dim} do not run on this device: at most {_MAX_HEAD_DIM}")
        if self.is_gpu and kv_dtype == "float8_e4m3fn":
            found = torch.cuda.get_device_capability(self.torch_device)
            if found < _MIN_CAPABILITY_E4M3:
                reason = _too_old(self.torch_device, found, needed=_MIN_CAPABILITY_E4M3)
                raise UnsupportedError("kv_dtype", kv_dtype, reason)
        if self._backend == "fa3" and self.external_attention is not None:
            reason = self.why_own_attention(geometry, dtype)
            if reason is not None:
                raise UnsupportedError("attention", self._backend, reason)
        queries_per_tile(geometry)

    @property
    def card(self) -> str:
        """The name of the GPU."""
        return torch.cuda.get_device_name(self.torch_device) if self.is_gpu else "Triton's interpreter"

    def why_own_attention(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        """Why our own kernels compute the attention of long prompts, in words that follow "fa3"; None if fa3 does.

        Empty if fa3 was not asked for. `dtype` is the activations'.
        """
        if self.external_attention is None:
            return self._why_own_attention
        if geometry.has_windows:
            return "knows no sliding windows"
        if geometry.has_sinks:
            return "knows no attention sinks"
        return self.external_attention.refusal(geometry, dtype)

    def num_own_chunks(
        self,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        query_lens: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
    ) -> int:
        """How many of a step's chunks our own kernels take; the rest are external. `dtype` is the activations'."""
        if self.why_own_attention(geometry, dtype) is not None:
            return len(query_lens)
        return num_own_chunks(query_lens, context_lens, geometry, min_tokens=self.min_external_tokens)

    def plan_tiles(
        self, geometry: AttentionGeometry, query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]
    ) -> PrefillTiles:
        """How this device cuts the attention of a step's chunks. Lengths are int32[C]; contexts include the queries."""
        return plan_tiles(
            query_lens,
            context_lens,
            num_queries=queries_per_tile(geometry),
            max_pieces=self.max_pieces(geometry),
        )

    def max_pieces(self, geometry: AttentionGeometry) -> int:
        """The most pieces that `plan_tiles` cuts a step's tiles into. It may return more tiles, all uncut."""
        if self.is_deterministic:
            return 1
        return -(-self._num_programs // geometry.num_kv_heads)

    def plan_attention(self, geometry: AttentionGeometry, batch: PagedBatch, *, kv: KVMemory) -> StepAttention:
        """The attention of a batch whose heads `check_attention` accepts. Launches nothing."""
        self.reserve_decodes(geometry, batch.num_decodes)
        if self._prefill_scratch is None and batch.chunks is not None:
            max_parts = self.max_pieces(geometry)
            self._prefill_scratch = PrefillScratch(max_parts=max_parts, geometry=geometry, device=self.torch_device)
        return TritonStepAttention(
            geometry,
            batch,
            kv=kv,
            scratch=self._scratch,
            prefill_scratch=self._prefill_scratch,
            external_attention=self.external_attention,
            is_deterministic=self.is_deterministic,
            ranks=self.cuda_ranks,
        )

    def reserve_decodes(self, geometry: AttentionGeometry, num_rows: int) -> None:
        """Allocate scratch memory for up to `num_rows` decodes. Smaller batches do not move it under CUDA graphs."""
        if num_rows > self._max_scratch_rows:
            self._max_scratch_rows = num_rows
            self._scratch = DecodeScratch(max_rows=num_rows, geometry=geometry, device=self.torch_device)


def _too_old(device: torch.device, found: tuple[int, int], *, needed: tuple[int, int]) -> str:
    """Why a GPU of the capability `found` is not enough, in words that follow a parameter."""
    name = torch.cuda.get_device_name(device)
    return f"needs compute capability {needed[0]}.{needed[1]} or newer; {name} has {found[0]}.{found[1]}"
