"""A rank of a group of GPUs of one host (devices.rank_group.RankGroup), each in a process of its own, over NCCL.

Every method enqueues work on the current stream and returns. All ranks call the same methods in the same order, so that
they can be captured in CUDA graphs. Where tensors lie in host memory, as in tests, gloo takes NCCL's place.
"""

import gc
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from headwater.devices.cuda.ranks.one_shot import open_one_shot

# NVLink's multicast is left alone: on shared hosts it is often not to be had, and the failure takes the process
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name in older versions


class CudaRanks:
    """This process as one rank."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        rendezvous: Path,
        torch_device: torch.device,
        limit_s: float = 600.0,
        uses_one_shot: bool = True,
    ) -> None:
        """Wait for all ranks, which name the same file `rendezvous`; it must not exist before. At most `limit_s`.

        Small sums are our own kernel's if it passes its test, unless `uses_one_shot` is false on all ranks.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank must be in [0, {size}), found {rank}")
        self.rank = rank
        self.size = size
        self.torch_device = torch_device
        is_gpu = torch_device.type == "cuda"
        if is_gpu:
            os.environ.update(_NO_MULTICAST)
            torch.cuda.set_device(torch_device)
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=limit_s),
            device_id=torch_device if is_gpu else None,
        )
        # sums of small messages, if our own kernel computes them
        self.one_shot = open_one_shot(rank=rank, size=size, device=torch_device) if is_gpu and uses_one_shot else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x becomes the sum of x over all ranks."""
        if self.one_shot is not None and self.one_shot.suits(x):
            self.one_shot.all_reduce(x)
        else:
            dist.all_reduce(x)
        return x

    def add_reduced(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += the sum of x over all ranks, which may overwrite x."""
        if self.one_shot is not None and self.one_shot.suits(x) and residual.is_contiguous():
            self.one_shot.add_reduced(residual, x)
        else:
            dist.all_reduce(x)
            residual += x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *shape of x]: the x of every rank."""
        x = x.contiguous()
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(gathered.view(-1), x.view(-1))
        return gathered

    def broadcast(self, x: torch.Tensor) -> None:
        """x becomes that of rank 0."""
        dist.broadcast(x, src=0)

    def close(self) -> None:
        """CUDA graphs that contain sums must be gone, or nothing but rubbish: NCCL waits for them without a limit."""
        if self.torch_device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self.torch_device)
        dist.destroy_process_group()


class RankedLogits:
    """Logits of which each rank has the columns of its tokens: the parts are [rows, tokens of the rank]."""

    def __init__(self, ranks: CudaRanks, tokens: Sequence[range]) -> None:
        """`tokens[r]` are the tokens of rank r."""
        self._ranks = ranks
        self._tokens = tokens
        self._widest = max(len(part) for part in tokens)
        self._firsts = torch.tensor([part.start for part in tokens], dtype=torch.int32, device=ranks.torch_device)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The logits of all ranks, on every rank. float32[rows, vocab_size]"""
        padded = torch.nn.functional.pad(part, (0, self._widest - part.shape[1]))
        parts = self._ranks.all_gather(padded)
        return torch.cat([each[:, : len(of)] for each, of in zip(parts, self._tokens, strict=True)], dim=1)

    @property
    def own_tokens(self) -> range:
        return self._tokens[self._ranks.rank]

    def merge_draws(
        self, part: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, newest: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Choose among the tokens that each rank has drawn from its part, int32[2, N]: scores as bits, tokens.

        Into result[0, row] and newest[slot] of every rank; the first token of equal scores.
        """
        found = self._ranks.all_gather(part)
        scores = found[:, 0].view(torch.float32)
        is_best = scores == scores.amax(dim=0)
        tokens = torch.where(is_best, found[:, 1], torch.iinfo(torch.int32).max).amin(dim=0)
        result[0].index_copy_(0, rows.long(), tokens)
        newest.index_copy_(0, slots.long(), tokens)

    def merge_greedy(
        self, part: torch.Tensor, slots: torch.Tensor, *, newest: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Replace the tokens that `choose_greedy` has chosen within the parts by the first best of all ranks.

        As that kernel: tokens into result[0] and newest[slot], and whether all logits are finite into result[1]. 12
        bytes of a row and rank are exchanged.
        """
        num_rows = len(part)
        chosen = result[0, :num_rows]
        best = part.gather(1, chosen[:, None].long())[:, 0]
        found = self._ranks.all_gather(torch.stack((best.view(torch.int32), chosen, result[1, :num_rows])))
        logits = found[:, 0].view(torch.float32)
        is_finite = found[:, 2].amin(dim=0)
        logits = torch.where(found[:, 2] != 0, logits, -float("inf"))
        is_best = logits == logits.amax(dim=0)
        tokens = torch.where(is_best, found[:, 1] + self._firsts[:, None], torch.iinfo(torch.int32).max).amin(dim=0)
        tokens = torch.where(is_finite != 0, tokens, 0).to(torch.int32)
        result[0, :num_rows] = tokens
        result[1, :num_rows] = is_finite
        newest.index_copy_(0, slots.long(), tokens)
