"""Our own sum over ranks for small messages (kernels/one_shot.py), taken if it computes what NCCL does."""

import logging

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from headwater.devices.cuda.kernels.one_shot import OneShotBuffers, one_shot_all_reduce

MAX_BYTES = 512 << 10  # above, NCCL passes parts on and moves less
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TEST_NUMBERS = (24, 4096, 100_003, MAX_BYTES // 2)
_TEST_ROUNDS = 4
_TEST_SPINS = 1 << 21  # looks at a flag: some seconds

_log = logging.getLogger(__name__)


class OneShot:
    """The kernel and its buffers on one rank. Calls follow each other on one stream, and are the same on all ranks."""

    def __init__(self, *, rank: int, size: int, device: torch.device) -> None:
        """Raises what PyTorch raises where the GPUs cannot address each other's memory."""
        self._buffers = OneShotBuffers(rank=rank, size=size, max_numbers=MAX_BYTES // 2, device=device)
        group = dist.group.WORLD
        assert group is not None
        self._memory = symmetric_memory.empty(self._buffers.num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, group.group_name)
        self._memory.zero_()
        offset = self._memory.data_ptr() - self._handle.buffer_ptrs[rank]
        addresses = [address + offset for address in self._handle.buffer_ptrs]
        self._buffers.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        dist.barrier()  # every buffer is zeros before the first flag is raised

    def suits(self, x: torch.Tensor) -> bool:
        return x.dtype in _DTYPES and x.numel() * x.element_size() <= MAX_BYTES and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor) -> None:
        """x becomes the sum of x over all ranks."""
        one_shot_all_reduce(x, self._buffers, out=x, adds=False)

    def add_reduced(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += the sum of x over all ranks."""
        one_shot_all_reduce(x, self._buffers, out=residual, adds=True)

    def computes_as_nccl(self) -> bool:
        """Random whole numbers, whose sums are exact in any order: several calls in a CUDA graph, replayed."""
        device = self._memory.device
        generator = torch.Generator(device).manual_seed(1 + self._buffers.rank)
        is_equal = True
        for num in _TEST_NUMBERS:
            x = torch.zeros(num, dtype=torch.bfloat16, device=device)
            total = torch.zeros(num, dtype=torch.float32, device=device)

            def add_twice(x: torch.Tensor = x, total: torch.Tensor = total) -> None:
                for _ in range(2):
                    one_shot_all_reduce(x, self._buffers, out=total, adds=True, max_spins=_TEST_SPINS)

            add_twice()  # compiles the kernel, which a capture must not
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                add_twice()
            expected = torch.zeros_like(total)
            for _ in range(_TEST_ROUNDS):
                x.copy_(torch.randint(-8, 9, (num,), generator=generator, device=device))
                graph.replay()
                summed = x.float()
                dist.all_reduce(summed)
                expected += 2 * summed
            is_equal = is_equal and torch.equal(total, expected)
        return is_equal and not self._buffers.failures.item()


def open_one_shot(*, rank: int, size: int, device: torch.device) -> OneShot | None:
    """The kernel if it works on every rank; else None, with the reason in the log. All ranks call this together."""
    found, reason = None, ""
    try:
        found = OneShot(rank=rank, size=size, device=device)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = f"the GPUs do not address each other's memory: {error}"
    if _is_true_everywhere(found is not None, device) and found is not None:
        try:
            is_right = found.computes_as_nccl()
        except RuntimeError as error:
            is_right, reason = False, str(error)
        if _is_true_everywhere(is_right, device):
            return found
        reason = reason or "its sums differ from NCCL's, or a rank did not see another"
    _log.warning("sums over ranks are NCCL's, also small ones: %s", reason or "another rank cannot do otherwise")
    return None


def _is_true_everywhere(value: bool, device: torch.device) -> bool:
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
