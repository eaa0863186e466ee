"""Our own sum over ranks for small messages (kernels/one_shot.py), taken if it computes what NCCL does."""

import logging

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from headwater.devices.cuda.kernels.one_shot import OneShotBuffers, one_shot_all_reduce

_MAX_BYTES = 512 << 10  # above, NCCL passes parts on and moves less
_MAX_BYTES_OF_TWO = 4 << 20  # two ranks move equally much either way; long messages gain nothing, and NCCL blocks less
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TEST_NUMBERS = (24, 4096, 100_003)  # and the largest
_TEST_ROUNDS = 4
_TEST_SPINS = 1 << 21  # looks at a flag: about a second

_log = logging.getLogger(__name__)


class OneShot:
    """The kernel and its buffers on one rank. Calls follow each other on one stream, and are the same on all ranks."""

    def __init__(self, *, rank: int, size: int, device: torch.device) -> None:
        """Raises what PyTorch raises where the GPUs cannot address each other's memory."""
        self._max_bytes = _MAX_BYTES_OF_TWO if size == 2 else _MAX_BYTES
        self._buffers = OneShotBuffers(rank=rank, size=size, max_numbers=self._max_bytes // 2, device=device)
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
        return x.dtype in _DTYPES and x.numel() * x.element_size() <= self._max_bytes and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor) -> None:
        """x becomes the sum of x over all ranks."""
        one_shot_all_reduce(x, self._buffers, out=x, adds=False)

    def add_reduced(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += the sum of x over all ranks."""
        one_shot_all_reduce(x, self._buffers, out=residual, adds=True)

    def find_fault(self) -> str:
        """Nothing if the kernel computes what NCCL does, else what is wrong. All ranks call this together."""
        for num in (*_TEST_NUMBERS, _MAX_BYTES // 2):
            if fault := self._fault_with(num):
                return fault
        if self._max_bytes > _MAX_BYTES and (fault := self._fault_with(self._max_bytes // 2)):
            _log.warning("sums over ranks above %d KiB are NCCL's: %s", _MAX_BYTES >> 10, fault)
            self._max_bytes = _MAX_BYTES  # on all ranks: they agree on every fault
        return ""

    def _fault_with(self, num: int) -> str:
        """The fault in sums of so many numbers."""
        device = self._memory.device
        x = torch.zeros(num, dtype=torch.bfloat16, device=device)
        total = torch.zeros(num, dtype=torch.float32, device=device)
        for step in (self._fault_of_compilation, self._fault_of_flags, self._fault_of_sums):
            fault = step(total, x)
            if not _is_true_everywhere(not fault, device):
                return fault or "another rank found a fault"
        return ""

    def _fault_of_compilation(self, total: torch.Tensor, x: torch.Tensor) -> str:
        """Ranks compile for seconds, and not all as long: no rank waits for another meanwhile."""
        try:
            self._add_to(total, x, max_spins=0)
        except Exception as error:  # noqa: BLE001 - the compiler raises many kinds
            return f"the kernel does not compile: {error}"
        return ""

    def _fault_of_flags(self, total: torch.Tensor, x: torch.Tensor) -> str:
        self._meet()
        total.zero_()
        self._buffers.failures.zero_()
        self._meet()
        self._add_to(total, x, max_spins=_TEST_SPINS)
        return self._unseen_ranks()

    def _fault_of_sums(self, total: torch.Tensor, x: torch.Tensor) -> str:
        """Random whole numbers, whose sums are exact in any order: two calls in a CUDA graph, replayed."""
        generator = torch.Generator(x.device).manual_seed(1 + self._buffers.rank)
        torch.cuda.synchronize(x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(2):
                self._add_to(total, x, max_spins=_TEST_SPINS)
        expected = torch.zeros_like(total)
        for _ in range(_TEST_ROUNDS):
            x.copy_(torch.randint(-8, 9, x.shape, generator=generator, device=x.device))
            self._meet()
            graph.replay()
            summed = x.float()
            dist.all_reduce(summed)
            expected += 2 * summed
        num_wrong = int((total != expected).sum())
        largest = (total - expected).abs().max().item()
        differ = f"{num_wrong} of {x.numel()} sums differ from NCCL's, by up to {largest:g}" if num_wrong else ""
        return self._unseen_ranks() or differ

    def _unseen_ranks(self) -> str:
        failures = self._buffers.failures.tolist()
        unseen = [f"rank {rank} {num} times" for rank, num in enumerate(failures) if num]
        return f"rank {self._buffers.rank} waited in vain for the flag of {', '.join(unseen)}" if unseen else ""

    def _add_to(self, total: torch.Tensor, x: torch.Tensor, *, max_spins: int) -> None:
        one_shot_all_reduce(x, self._buffers, out=total, adds=True, max_spins=max_spins)

    def _meet(self) -> None:
        """Wait until all ranks are here and their cards idle, so that waits are short where flags arrive at all."""
        torch.cuda.synchronize(self._memory.device)
        dist.barrier()
        torch.cuda.synchronize(self._memory.device)


def open_one_shot(*, rank: int, size: int, device: torch.device) -> OneShot | None:
    """The kernel if it works on every rank; else None, with the reason in the log. All ranks call this together."""
    found, reason = None, ""
    try:
        found = OneShot(rank=rank, size=size, device=device)
    except (RuntimeError, AttributeError) as error:  # AttributeError: PyTorch's module for this memory is private
        reason = f"no memory that all GPUs address: {type(error).__name__}: {error}"
    if _is_true_everywhere(found is not None, device) and found is not None:
        reason = found.find_fault()
        if not reason:
            return found
    _log.warning("sums over ranks are NCCL's, also small ones: %s", reason or "another rank cannot do otherwise")
    return None


def _is_true_everywhere(value: bool, device: torch.device) -> bool:
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
