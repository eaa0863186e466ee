"""Layers and attention in native kernels, for bfloat16 weights and KV (sources in native/).

Weights are packed in the order in which the kernel reads them: blocks of 32 output features, [in / 2][32][2], the last
one padded with zeros. Shape letters as in device.py.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from headwater.devices.cpu.native_library import AttentionJob
from headwater.devices.device import AttentionBatch, AttentionGeometry
from headwater.devices.kv_memory import KVMemory

_BLOCK = 32
_MAX_HEAD_DIM = 256
_MAX_HEADS_PER_KV_HEAD = 96
_STORE_BF16, _STORE_F32, _ADD_F32, _GATED_BF16 = range(4)


def can_run_linear(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0


def can_run_attention(geometry: AttentionGeometry, dtype: str) -> bool:
    return (
        dtype == "bfloat16"
        and geometry.head_dim % _BLOCK == 0
        and geometry.head_dim <= _MAX_HEAD_DIM
        and geometry.num_heads // geometry.num_kv_heads <= _MAX_HEADS_PER_KV_HEAD
    )


class NativeLinear:
    """A linear layer (device.Linear) on packed weights."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor] | None,
        *,
        num_threads: int,
    ) -> None:
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.out_features, self.in_features = weight.shape
        self._kernel = library.hw_linear
        self._num_threads = num_threads
        self._packed = _pack(weight)
        self._bias = None
        if biases is not None:
            self._bias = torch.zeros(len(self._packed) * _BLOCK)
            self._bias[: self.out_features] = torch.cat(list(biases))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty((len(x), self.out_features), dtype=torch.bfloat16)
        self._run(x, y, _STORE_BF16)
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        assert residual.dtype == torch.float32 and residual.is_contiguous()
        self._run(x, residual, _ADD_F32)

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.empty((len(x), self.out_features), dtype=torch.float32) if out is None else out
        self._run(x, y, _STORE_F32)
        return y

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        pairs = self._packed.view(torch.int32)[..., 0]  # [blocks, in / 2, 32]
        return pairs[ids // _BLOCK, :, ids % _BLOCK].view(torch.bfloat16)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None if self._bias is None else self._bias[: self.out_features].to(torch.bfloat16)
        return _unpack(self._packed, self.out_features), bias

    def _run(self, x: torch.Tensor, y: torch.Tensor, mode: int) -> None:
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == self.in_features
        bias = None if self._bias is None else self._bias.data_ptr()
        self._kernel(
            x.data_ptr(), len(x), self.in_features, self._packed.data_ptr(), bias, self.out_features, mode,
            y.data_ptr(), self._num_threads,
        )  # fmt: skip


class NativeGatedLinear:
    """The gated half of an MLP (device.GatedLinear); each packed block holds 16 gate and 16 up features."""

    def __init__(
        self,
        library: ctypes.CDLL,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        num_threads: int,
    ) -> None:
        self.out_features, self.in_features = gate.shape
        self._kernel = library.hw_linear
        self._num_threads = num_threads
        self._packed = _pack(_interleave(gate, up))
        self._bias = None
        if gate_bias is not None and up_bias is not None:
            self._bias = _interleave(gate_bias[:, None], up_bias[:, None])[:, 0].float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == self.in_features
        y = torch.empty((len(x), self.out_features), dtype=torch.bfloat16)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._kernel(
            x.data_ptr(), len(x), self.in_features, self._packed.data_ptr(), bias, 2 * self.out_features,
            _GATED_BF16, y.data_ptr(), self._num_threads,
        )  # fmt: skip
        return y

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        gate, up = self._part(_unpack(self._packed, len(self._packed) * _BLOCK))
        if self._bias is None:
            return gate, up, None, None
        gate_bias, up_bias = self._part(self._bias.to(torch.bfloat16)[:, None])
        return gate, up, gate_bias[:, 0], up_bias[:, 0]

    def _part(self, interleaved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        halves = interleaved.view(-1, 2, _BLOCK // 2, interleaved.shape[1])
        gate, up = (halves[:, half].reshape(-1, interleaved.shape[1]) for half in (0, 1))
        return gate[: self.out_features], up[: self.out_features]


class NativeStepAttention:
    """The attention of one step (device.StepAttention)."""

    def __init__(
        self,
        library: ctypes.CDLL,
        geometry: AttentionGeometry,
        batch: AttentionBatch,
        *,
        kv: KVMemory,
        num_threads: int,
    ) -> None:
        layout = kv.layout
        page_size = layout.page_size
        rows = np.repeat(np.arange(len(batch.context_lens)), batch.query_lens)
        pages = batch.page_tables[rows, batch.positions // page_size].astype(np.int64)
        token_slots = pages * page_size + batch.positions % page_size
        per_chunk = library.hw_queries_per_chunk(geometry.num_heads // geometry.num_kv_heads)
        chunks = _query_chunks(batch, per_chunk)
        arrays = [batch.query_starts, batch.context_lens, batch.page_tables, token_slots, chunks]
        assert all(array.flags.c_contiguous for array in arrays)
        self._kernel = library.hw_attention
        self._alive = (arrays, batch, kv)  # the job holds addresses only
        self._out_features = geometry.num_heads * geometry.head_dim
        self._job = AttentionJob(
            *(array.ctypes.data for array in arrays),
            cos=batch.cos.data_ptr(),
            sin=batch.sin.data_ptr(),
            kv=kv.memory.ctypes.data,
            num_tokens=len(token_slots),
            num_chunks=len(chunks),
            table_stride=batch.page_tables.shape[1],
            queries_per_chunk=per_chunk,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            num_layers=layout.num_layers,
            page_size=page_size,
            norm_eps=geometry.norm_eps,
            scale=geometry.head_dim**-0.5,
            threads=num_threads,
        )

    def __call__(
        self, qkv: torch.Tensor, layer: int, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
    ) -> torch.Tensor:
        assert qkv.dtype == torch.bfloat16 and qkv.is_contiguous()
        out = torch.empty((len(qkv), self._out_features), dtype=torch.bfloat16)
        job = self._job
        job.layer, job.qkv, job.out = layer, qkv.data_ptr(), out.data_ptr()
        job.q_norm = None if q_norm is None else q_norm.data_ptr()
        job.k_norm = None if k_norm is None else k_norm.data_ptr()
        self._kernel(ctypes.byref(job))
        return out


def _query_chunks(batch: AttentionBatch, per_chunk: int) -> np.ndarray:
    """int64[n], row << 32 | first query: the work of one step, longest first, so that threads end together."""
    num_chunks = -(-batch.query_lens // per_chunk)
    rows = np.repeat(np.arange(len(num_chunks)), num_chunks)
    firsts = (np.arange(len(rows)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)) * per_chunk
    num_keys = batch.context_lens[rows] - batch.query_lens[rows] + firsts
    work = num_keys * np.minimum(per_chunk, batch.query_lens[rows] - firsts)
    return ((rows.astype(np.int64) << 32) | firsts)[np.argsort(-work, kind="stable")]


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [ceil(out / 32), in / 2, 32, 2]."""
    num_blocks = -(-weight.shape[0] // _BLOCK)
    if weight.shape[0] % _BLOCK:
        padding = weight.new_zeros(num_blocks * _BLOCK - weight.shape[0], weight.shape[1])
        weight = torch.cat((weight, padding))
    return weight.view(num_blocks, _BLOCK, -1, 2).transpose(1, 2).contiguous()


def _unpack(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    return packed.transpose(1, 2).reshape(len(packed) * _BLOCK, -1)[:out_features]


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """16 rows of `gate`, 16 rows of `up`, and so on; padded with zeros to whole blocks."""
    half = _BLOCK // 2
    padding = gate.new_zeros(-len(gate) % half, gate.shape[1])
    blocks = [torch.cat((part, padding)).view(-1, half, gate.shape[1]) for part in (gate, up)]
    return torch.stack(blocks, dim=1).view(-1, gate.shape[1])
