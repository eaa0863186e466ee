"""The sum over ranks in one kernel, a rank at a time: without a GPU the other ranks' numbers are there before."""

import functools

import pytest
import torch

from headwater.devices.cuda.kernels.one_shot import BLOCK, OneShotBuffers, one_shot_all_reduce

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

CPU = torch.device("cpu")


class Peers:
    """Buffers of all ranks in one memory. A rank computes after all others have written and raised their flags."""

    def __init__(self, max_numbers: int, *, size: int) -> None:
        self.size = size
        self.buffers = [OneShotBuffers(rank=r, size=size, max_numbers=max_numbers, device=CPU) for r in range(size)]
        self.memory = [torch.zeros(each.num_bytes, dtype=torch.uint8) for each in self.buffers]
        for each in self.buffers:
            each.addresses = torch.tensor([memory.data_ptr() for memory in self.memory])

    def flags(self, rank: int) -> torch.Tensor:
        """[blocks, ranks]: what the others have told `rank`."""
        each = self.buffers[rank]
        flags = self.memory[rank][: 4 * each.max_blocks * self.size].view(torch.int32)
        return flags.view(each.max_blocks, self.size)

    def part(self, rank: int, call: int, block: int, dtype: torch.dtype) -> torch.Tensor:
        """What a block of `rank` shows in a call."""
        each = self.buffers[rank]
        start = each.flag_bytes + (call & 1) * each.area_bytes + block * 4 * BLOCK
        return self.memory[rank][start : start + 4 * BLOCK].view(dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu/all_reduce.py runs it on GPUs")
@pytest.mark.parametrize(
    ("dtype", "size", "rank"),
    [(torch.bfloat16, 2, 0), (torch.bfloat16, 3, 1), (torch.float32, 4, 3), (torch.bfloat16, 8, 5)],
)
def test_a_rank_adds_up_in_order_and_shows_its_part_to_the_others(dtype: torch.dtype, size: int, rank: int) -> None:
    """Sizes that fill no block, several calls: each reads the area of its own call."""
    peers = Peers(2 * BLOCK, size=size)
    others = [other for other in range(size) if other != rank]
    for call, num in enumerate((BLOCK + 7, BLOCK, 5, 2 * BLOCK), start=1):
        parts = [torch.randn(num).to(dtype) for _ in range(size)]
        num_blocks = -(-num // BLOCK)
        own = peers.buffers[rank]
        calls = own.counters[:num_blocks] + 1
        assert calls[0] == call
        for other in others:  # they are ahead: their parts and flags are there
            for block, of in enumerate(calls.tolist()):
                shown = parts[other][block * BLOCK : (block + 1) * BLOCK]
                peers.part(other, of, block, dtype)[: len(shown)] = shown
                peers.flags(rank)[block, other] = of
        residual = torch.randn(num)
        expected = functools.reduce(torch.add, [part.float() for part in parts])
        out = residual.clone()
        one_shot_all_reduce(parts[rank], own, out=out, adds=True, max_spins=0)
        assert torch.equal(out, expected + residual)
        assert not own.failures.any()
        for other in others:
            assert peers.flags(other)[:num_blocks, rank].tolist() == calls.tolist()
        for block, of in enumerate(calls.tolist()):
            shown = parts[rank][block * BLOCK : (block + 1) * BLOCK]
            assert torch.equal(peers.part(rank, of, block, dtype)[: len(shown)], shown)


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu/all_reduce.py runs it on GPUs")
def test_a_wait_can_be_given_up() -> None:
    """The self-test at start must fail, not hang, where ranks cannot see each other's flags."""
    peers = Peers(BLOCK, size=3)
    x = torch.ones(8)
    one_shot_all_reduce(x, peers.buffers[0], out=x, adds=False, max_spins=3)
    assert peers.buffers[0].failures.tolist() == [0, 1, 1]
