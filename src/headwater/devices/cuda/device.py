"""An NVIDIA GPU as a device: cuBLAS for the products, our own Triton kernels for everything else."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cuda.attention import TritonStepAttention
from headwater.devices.cuda.external_attention import (
    MIN_EXTERNAL_TOKENS,
    AttentionBackend,
    num_own_chunks,
    open_external_attention,
)
from headwater.devices.cuda.kernels.decode import DecodeScratch
from headwater.devices.cuda.kernels.layers import rms_norm
from headwater.devices.cuda.kernels.prefill import PrefillScratch, queries_per_tile
from headwater.devices.cuda.linear import CudaGatedLinear, CudaLinear
from headwater.devices.cuda.paged_batch import Contexts, ExternalChunks, PagedBatch, PromptChunks
from headwater.devices.cuda.prefill_tiles import PrefillTiles, plan_tiles
from headwater.devices.device import AttentionBatch, AttentionGeometry, GatedLinear, Linear, StepAttention
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.devices.noise import NoiseKeys, exponential_noise

# 16-bit floats need the tensor cores of this generation at least (Ampere)
_MIN_CAPABILITY = (8, 0)
_MIN_CAPABILITY_E4M3 = (8, 9)  # Ada; Ampere converts from float8_e5m2 only
_MAX_HEAD_DIM = 256
_INTERPRETED_PROGRAMS = 16  # small, yet enough for the tests to see prompts' attention in pieces


class CudaDevice:
    """One GPU (device.Device). `attention` names the kernels of long prompts; all others are our own.

    With `torch_device` a CPU, the same code runs under Triton's interpreter: the tests' way to it.
    """

    name = "cuda"

    def __init__(self, torch_device: torch.device | None = None, *, attention: AttentionBackend = "triton") -> None:
        if torch_device is None:
            if not torch.cuda.is_available():
                raise ValueError("--device cuda needs an NVIDIA GPU and a build of PyTorch with CUDA; found none")
            torch_device = torch.device("cuda")
        if torch_device.type == "cuda" and torch_device.index is None:
            torch_device = torch.device("cuda", torch.cuda.current_device())
        self.torch_device = torch_device
        self._backend: AttentionBackend = attention
        self.external_attention = open_external_attention(attention, torch_device)
        self.min_external_tokens = MIN_EXTERNAL_TOKENS
        self.is_gpu = torch_device.type == "cuda"
        self._scratch: DecodeScratch | None = None  # sized by the largest batch seen
        self._max_scratch_rows = 0
        self._prefill_scratch: PrefillScratch | None = None
        # two programs of prompts' attention fit in a multiprocessor
        self._num_programs = (
            2 * torch.cuda.get_device_properties(torch_device).multi_processor_count
            if self.is_gpu
            else _INTERPRETED_PROGRAMS
        )
        if self.is_gpu and (found := torch.cuda.get_device_capability(torch_device)) < _MIN_CAPABILITY:
            raise ValueError(
                f"--device cuda needs compute capability {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} or newer; "
                f"{torch.cuda.get_device_name(torch_device)} has {found[0]}.{found[1]}"
            )

    def auto_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def free_memory_bytes(self) -> int:
        """What the driver says is free, after unused memory of PyTorch's allocator was given back."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def trim_memory(self) -> None:
        if self.is_gpu:
            torch.cuda.empty_cache()

    def enter_thread(self) -> None:
        """Make this GPU the calling thread's, which CUDA keeps per thread."""
        if self.is_gpu:
            torch.cuda.set_device(self.torch_device)

    def allocate_kv(self, layout: KVLayout, num_pages: int) -> KVMemory:
        return KVMemory(
            layout, torch.empty((num_pages, layout.page_bytes), dtype=torch.uint8, device=self.torch_device)
        )

    def pack_linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None) -> Linear:
        return CudaLinear(weights, biases)

    def pack_gated_linear(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> GatedLinear:
        return CudaGatedLinear(gate, up, gate_bias, up_bias)

    def rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(residual, weight, eps)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)

    def draw(self, logits: torch.Tensor, keys: NoiseKeys) -> torch.Tensor:
        ids = torch.arange(logits.shape[1], device=logits.device)[None]
        return self.argmax(logits - exponential_noise(keys, ids).log_())

    def plan_attention(
        self,
        geometry: AttentionGeometry,
        batch: AttentionBatch,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: KVMemory,
    ) -> StepAttention:
        """Of a batch on the host that `check_attention` accepts; single tokens before the first chunk are decodes."""
        query_lens, starts = batch.query_lens, batch.query_starts[:-1]
        is_chunk = query_lens > 1
        num_decodes = int(is_chunk.argmax()) if is_chunk.any() else len(query_lens)
        slots = np.arange(len(query_lens), dtype=np.int32)
        rotary_rows = np.arange(len(batch.positions), dtype=np.int32)
        chunks = None
        if num_decodes < len(query_lens):
            rest = slice(num_decodes, None)
            first_external = num_decodes + self.num_own_chunks(
                geometry, kv.layout.dtype, query_lens[rest], batch.context_lens[rest]
            )
            in_tiles = slice(num_decodes, first_external)
            tiles = self.plan_tiles(geometry, query_lens[in_tiles], batch.context_lens[in_tiles])
            chunks = PromptChunks(
                token_slots=self._on_device(np.repeat(slots[rest], query_lens[rest])),
                positions=self._on_device(batch.positions[rest]),
                rotary_rows=self._on_device(rotary_rows[rest]),
                slots=self._on_device(slots[rest]),
                starts=self._on_device(starts[rest]),
                lens=self._on_device(query_lens[rest]),
                contexts=self._on_device(batch.context_lens[rest]),
                tiles=self._on_device(tiles.tiles),
                joins=self._on_device(tiles.joins),
                external=self._external_chunks(batch, first_external),
            )
        paged = PagedBatch(
            num_decodes=num_decodes,
            decode_slots=self._on_device(slots[:num_decodes]),
            positions=self._on_device(batch.positions[:num_decodes]),
            rotary_rows=self._on_device(rotary_rows[:num_decodes]),
            tables=self._on_device(batch.page_tables),
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            chunks=chunks,
        )
        return self.plan_paged_attention(geometry, paged, kv=kv)

    def check_attention(
        self, geometry: AttentionGeometry, dtype: torch.dtype, *, kv_dtype: torch.dtype | None = None
    ) -> None:
        """Raise ValueError for heads that the kernels do not take, and for a dtype of the KV that the card lacks."""
        if geometry.head_dim > _MAX_HEAD_DIM:
            raise ValueError(f"heads of {geometry.head_dim} do not run on this device: at most {_MAX_HEAD_DIM}")
        if self.is_gpu and kv_dtype == torch.float8_e4m3fn:
            found = torch.cuda.get_device_capability(self.torch_device)
            if found < _MIN_CAPABILITY_E4M3:
                raise ValueError(
                    f"--kv-cache-dtype fp8_e4m3 needs compute capability {_MIN_CAPABILITY_E4M3[0]}."
                    f"{_MIN_CAPABILITY_E4M3[1]} or newer; {torch.cuda.get_device_name(self.torch_device)} has "
                    f"{found[0]}.{found[1]}: take auto or fp8_e5m2"
                )
        if self._backend == "fa3" and self.external_attention is not None:
            reason = self.external_attention.refusal(geometry, dtype)
            if reason is not None:
                raise ValueError(f"--attention-backend fa3 {reason}")
        queries_per_tile(geometry)

    def num_own_chunks(
        self,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        query_lens: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
    ) -> int:
        """How many of a step's chunks our own kernels take; the rest are external. `dtype` is the activations'."""
        if self.external_attention is None or self.external_attention.refusal(geometry, dtype) is not None:
            return len(query_lens)
        return num_own_chunks(query_lens, context_lens, geometry, min_tokens=self.min_external_tokens)

    def plan_tiles(
        self, geometry: AttentionGeometry, query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]
    ) -> PrefillTiles:
        """The work of a step's prompt chunks as this device cuts it: int32[C] each, the contexts with the queries."""
        return plan_tiles(
            query_lens,
            context_lens,
            num_queries=queries_per_tile(geometry),
            max_pieces=self.max_pieces(geometry),
        )

    def max_pieces(self, geometry: AttentionGeometry) -> int:
        """Most pieces that `plan_tiles` cuts a step's tiles into; it may return more tiles, but none of them cut."""
        return -(-self._num_programs // geometry.num_kv_heads)

    def plan_paged_attention(self, geometry: AttentionGeometry, batch: PagedBatch, *, kv: KVMemory) -> StepAttention:
        """Of a batch that lies on the device already. Launches nothing."""
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
        )

    def reserve_decodes(self, geometry: AttentionGeometry, num_rows: int) -> None:
        """Scratch memory for up to `num_rows` decodes; what CUDA graphs have recorded stays where it is after it."""
        if num_rows > self._max_scratch_rows:
            self._max_scratch_rows = num_rows
            self._scratch = DecodeScratch(max_rows=num_rows, geometry=geometry, device=self.torch_device)

    def _external_chunks(self, batch: AttentionBatch, first_row: int) -> ExternalChunks | None:
        if first_row == len(batch.context_lens):
            return None
        starts, lens = batch.query_starts[first_row:], batch.context_lens[first_row:]
        contexts = None
        if (np.diff(starts) < lens).any():
            contexts = Contexts(
                slots=self._on_device(np.arange(first_row, len(batch.context_lens), dtype=np.int32)),
                starts=self._on_device(np.cumsum([0, *lens], dtype=np.int32)),
                num_tokens=int(lens.sum()),
                longest=int(lens.max()),
            )
        return ExternalChunks(
            first_token=int(starts[0]),
            starts=self._on_device(starts - starts[0]),
            longest=int(np.diff(starts).max()),
            contexts=contexts,
        )

    def _on_device(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(self.torch_device)
