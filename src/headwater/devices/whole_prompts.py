"""Attention of whole prompts by kernels of others: what one needs to do, and FlashAttention 3 (arXiv 2407.08608).

A prompt that begins at position 0 needs nothing that is only in pages, so kernels that know no pages can compute it.
"""

import importlib
import logging
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.device import AttentionGeometry
from headwater.devices.paged_batch import WholePrompts

AttentionBackend = Literal["auto", "triton", "fa3"]

_HOPPER = (9, 0)
_MAX_HEAD_DIM = 256

_log = logging.getLogger(__name__)


class WholePromptAttention(Protocol):
    """One way to compute it."""

    name: str

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        """Why it cannot compute such heads, in words that follow its name; None if it can."""
        ...

    def attend(
        self, qkv: torch.Tensor, out: torch.Tensor, geometry: AttentionGeometry, prompts: WholePrompts
    ) -> None:
        """Causal attention of each prompt over itself, into the last rows of `out` [T, H D].

        `qkv` is [T, (H + 2G) D], queries and keys rotated.
        """
        ...


class FlashAttention3:
    """The forward kernels of FlashAttention 3 as the package fa3-fwd brings them: bfloat16, no pages.

    ValueError where they are not installed, do not load, or were not made for the card.
    """

    name = "fa3"

    def __init__(self, device: torch.device) -> None:
        found = torch.cuda.get_device_capability(device)
        if found != _HOPPER:
            raise ValueError(
                f"--attention-backend fa3 needs compute capability 9.0 (Hopper); {torch.cuda.get_device_name(device)} "
                f"has {found[0]}.{found[1]}"
            )
        try:
            importlib.import_module("fa3_fwd._C")  # registers the operator
        except (ImportError, OSError) as error:
            raise ValueError(
                f"--attention-backend fa3 needs the package fa3-fwd (pip install 'headwater[fa3]'): {error}"
            ) from error
        self._forward = torch.ops.fa3_fwd.fwd

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        if dtype != torch.bfloat16:
            return f"computes bfloat16, not {str(dtype).removeprefix('torch.')}"
        if geometry.head_dim > _MAX_HEAD_DIM or geometry.head_dim % 8:
            return f"takes heads of at most {_MAX_HEAD_DIM} numbers, a multiple of 8, not {geometry.head_dim}"
        return None

    def attend(
        self, qkv: torch.Tensor, out: torch.Tensor, geometry: AttentionGeometry, prompts: WholePrompts
    ) -> None:
        num_heads, num_kv_heads = geometry.num_heads, geometry.num_kv_heads
        heads = qkv[prompts.first_token :].unflatten(-1, (-1, geometry.head_dim))
        self._forward(
            heads[:, :num_heads],
            heads[:, num_heads : num_heads + num_kv_heads],
            heads[:, num_heads + num_kv_heads :],
            out=out[prompts.first_token :].unflatten(-1, (num_heads, geometry.head_dim)),
            cu_seqlens_q=prompts.starts,
            cu_seqlens_k=prompts.starts,
            max_seqlen_q=prompts.longest,
            max_seqlen_k=prompts.longest,
            softmax_scale=geometry.head_dim**-0.5,
            is_causal=True,
            num_splits=1,
        )


def open_whole_prompts(backend: AttentionBackend, device: torch.device) -> WholePromptAttention | None:
    """What computes whole prompts: None where our own kernels do. auto: the fastest that is there.

    ValueError if the one that is asked for is not there.
    """
    if backend == "triton" or device.type != "cuda":
        return None
    try:
        return FlashAttention3(device)
    except ValueError as reason:
        if backend == "auto":
            _log.debug("attention of whole prompts by our own kernels: %s", reason)
            return None
        raise


def num_before_whole(query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32]) -> int:
    """Of a step's chunks, in their order: how many come before the whole prompts that they end with."""
    parts = np.flatnonzero(query_lens < context_lens)
    return int(parts[-1]) + 1 if len(parts) else 0
