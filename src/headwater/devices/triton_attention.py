"""The attention of one step by our own Triton kernels: decodes and prompt chunks over paged KV.

Whole prompts that a batch sets apart go to another backend's kernels.
"""

import torch

from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory
from headwater.devices.paged_batch import PagedBatch
from headwater.devices.triton_decode import DecodeScratch, decode
from headwater.devices.triton_prefill import PrefillScratch, prefill
from headwater.devices.triton_rotary import write_prompt_kv
from headwater.devices.whole_prompts import WholePromptAttention


class TritonStepAttention:
    """device.StepAttention over a batch that lies on the device."""

    def __init__(
        self,
        geometry: AttentionGeometry,
        batch: PagedBatch,
        *,
        kv: KVMemory,
        scratch: DecodeScratch | None,
        prefill_scratch: PrefillScratch | None,
        whole_prompts: WholePromptAttention | None = None,
    ) -> None:
        assert scratch is not None or not batch.num_decodes
        assert prefill_scratch is not None or batch.chunks is None
        assert whole_prompts is not None or batch.chunks is None or batch.chunks.whole is None
        self._geometry = geometry
        self._batch = batch
        self._kv = kv
        self._scratch = scratch
        self._prefill_scratch = prefill_scratch
        self._whole_prompts = whole_prompts

    def __call__(
        self, qkv: torch.Tensor, layer: int, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
    ) -> torch.Tensor:
        shape, batch, kv = self._geometry, self._batch, self._kv
        out = torch.empty((len(qkv), shape.num_heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        if batch.num_decodes:
            assert self._scratch is not None
            decode(
                qkv, out, shape, batch, kv=kv, layer=layer, scratch=self._scratch, q_norm=q_norm, k_norm=k_norm
            )
        if batch.chunks is not None:
            assert self._prefill_scratch is not None
            write_prompt_kv(qkv, shape, batch, kv=kv, layer=layer, q_norm=q_norm, k_norm=k_norm)
            if len(batch.chunks.tiles):
                prefill(qkv, out, shape, batch, kv=kv, layer=layer, scratch=self._prefill_scratch)
            if batch.chunks.whole is not None:
                assert self._whole_prompts is not None
                self._whole_prompts.attend(qkv, out, shape, batch.chunks.whole)
        return out
