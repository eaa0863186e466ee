"""Attention of prompt chunks by another project's kernels: the protocol, and FlashAttention 3 (arXiv 2407.08608).

External kernels know no pages. Whole prompts need nothing from pages. The contexts of long chunks are gathered first,
which takes far less time than their attention.
"""

import importlib
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cuda.paged_batch import ExternalChunks
from headwater.devices.device import AttentionGeometry
from headwater.devices.errors import UnsupportedError

AttentionBackend = Literal["auto", "triton", "fa3"]
Ints = npt.NDArray[np.int32]

MAX_GATHERED_BYTES = 256 << 20  # keys and values of one layer
MIN_EXTERNAL_TOKENS = 1024  # of a chunk behind a prefix: fewer queries leave much of a card idle
_HOPPER = (9, 0)
_MAX_HEAD_DIM = 256


class ExternalAttention(Protocol):
    """One external backend."""

    name: str

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        """Why the backend cannot compute such heads, in words that follow its name; None if it can."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        chunks: ExternalChunks,
        *,
        scale: float,
    ) -> None:
        """Causal attention of the chunks: their last queries see all keys of their contexts.

        `q` and `out` are [T, H, D] from `chunks.first_token` on, `k` and `v` [tokens of the contexts, G, D]; all may
        be parts of larger rows.
        """
        ...


class FlashAttention3:
    """The forward kernels of FlashAttention 3 from the package fa3-fwd: bfloat16, no pages.

    UnsupportedError if they are not installed, do not load, or do not support the GPU.
    """

    name = "fa3"

    def __init__(self, device: torch.device) -> None:
        found = torch.cuda.get_device_capability(device)
        if found != _HOPPER:
            card = f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
            raise UnsupportedError("attention", self.name, f"needs compute capability 9.0 (Hopper); {card}")
        try:
            importlib.import_module("fa3_fwd._C")  # registers the operator
        except (ImportError, OSError) as error:
            reason = f"needs the package fa3-fwd (pip install 'headwater[fa3]'): {error}"
            raise UnsupportedError("attention", self.name, reason) from error
        self._forward = torch.ops.fa3_fwd.fwd

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        if dtype != torch.bfloat16:
            return f"computes bfloat16, not {str(dtype).removeprefix('torch.')}"
        if geometry.head_dim > _MAX_HEAD_DIM or geometry.head_dim % 8:
            return f"takes heads of at most {_MAX_HEAD_DIM} numbers, a multiple of 8, not {geometry.head_dim}"
        return None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        chunks: ExternalChunks,
        *,
        scale: float,
    ) -> None:
        contexts = chunks.contexts or chunks
        self._forward(
            q,
            k,
            v,
            out=out,
            cu_seqlens_q=chunks.starts,
            cu_seqlens_k=contexts.starts,
            max_seqlen_q=chunks.longest,
            max_seqlen_k=contexts.longest,
            softmax_scale=scale,
            is_causal=True,
            num_splits=1,
        )


def open_external_attention(
    backend: AttentionBackend, device: torch.device
) -> tuple[ExternalAttention | None, str]:
    """The backend of external chunks: None if our own kernels compute everything. auto: the fastest one installed.

    The second value says why the fastest one is not used, in words that follow its name. It is empty if that one is
    used, or was not asked for. UnsupportedError if the named backend is not available.
    """
    if backend == "triton" or device.type != "cuda":
        return None, ""
    try:
        return FlashAttention3(device), ""
    except UnsupportedError as error:
        if backend == "auto":
            return None, error.reason
        raise


def num_own_chunks(query_lens: Ints, context_lens: Ints, geometry: AttentionGeometry, *, min_tokens: int) -> int:
    """How many of a step's chunks, in their order, come before those that are worth leaving to an external backend.

    These are whole prompts, and chunks of at least `min_tokens` if their contexts fit into the gathering buffer.
    """
    is_whole = query_lens == context_lens
    first = _last(~is_whole & (query_lens < min_tokens)) + 1
    token_bytes = 2 * geometry.num_kv_heads * geometry.head_dim * torch.bfloat16.itemsize
    if not is_whole[first:].all() and int(context_lens[first:].sum()) * token_bytes > MAX_GATHERED_BYTES:
        return _last(~is_whole) + 1
    return first


def _last(marked: npt.NDArray[np.bool_]) -> int:
    """Index of the last marked entry, -1 if there is none."""
    found = np.flatnonzero(marked)
    return int(found[-1]) if len(found) else -1
