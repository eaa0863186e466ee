"""The sum over ranks in one kernel, a rank at a time: without a GPU the other ranks' numbers are there before."""

import pytest
import torch

from headwater.devices.cuda.kernels.one_shot import BLOCK, OneShotBuffers, one_shot_all_reduce

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

SIZE = 3
CPU = torch.device("cpu")


class Peers:
    """Buffers of three ranks in one memory. A rank computes after all others have written and raised their flags."""

    def __init__(self, max_numbers: int) -> None:
        self.buffers = [OneShotBuffers(rank=r, size=SIZE, max_numbers=max_numbers, device=CPU) for r in range(SIZE)]
        self.memory = [torch.zeros(each.num_bytes, dtype=torch.uint8) for each in self.buffers]
        for each in self.buffers:
            each.addresses = torch.tensor([memory.data_ptr() for memory in self.memory])

    def flags(self, rank: int) -> torch.Tensor:
        """[blocks, ranks]: what the others have told `rank`."""
        each = self.buffers[rank]
        return self.memory[rank][: 4 * each.max_blocks * SIZE].view(torch.int32).view(each.max_blocks, SIZE)

    def part(self, rank: int, call: int, block: int, dtype: torch.dtype) -> torch.Tensor:
        """What a block of `rank` shows in a call."""
        each = self.buffers[rank]
        start = each.flag_bytes + (call & 1) * each.area_bytes + block * 4 * BLOCK
        return self.memory[rank][start : start + 4 * BLOCK].view(dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu/all_reduce.py runs it on GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rank_adds_up_in_order_and_shows_its_part_to_the_others(dtype: torch.dtype) -> None:
    """Sizes that fill no block, several calls: each reads the area of its own call."""
    peers = Peers(2 * BLOCK)
    for call, num in enumerate((BLOCK + 7, BLOCK, 5, 2 * BLOCK), start=1):
        parts = [torch.randn(num).to(dtype) for _ in range(SIZE)]
        num_blocks = -(-num // BLOCK)
        own = peers.buffers[1]
        calls = own.counters[:num_blocks] + 1
        assert calls[0] == call
        for rank in (0, 2):  # they are ahead: their parts and flags are there
            for block, of in enumerate(calls.tolist()):
                shown = parts[rank][block * BLOCK : (block + 1) * BLOCK]
                peers.part(rank, of, block, dtype)[: len(shown)] = shown
                peers.flags(1)[block, rank] = of
        residual = torch.randn(num)
        expected = parts[0].float() + parts[1].float() + parts[2].float()
        out = residual.clone()
        one_shot_all_reduce(parts[1], own, out=out, adds=True, max_spins=0)
        assert torch.equal(out, expected + residual)
        assert not own.failures.any()
        for rank in (0, 2):
            assert peers.flags(rank)[:num_blocks, 1].tolist() == calls.tolist()
        for block, of in enumerate(calls.tolist()):
            shown = parts[1][block * BLOCK : (block + 1) * BLOCK]
            assert torch.equal(peers.part(1, of, block, dtype)[: len(shown)], shown)


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu/all_reduce.py runs it on GPUs")
def test_a_wait_can_be_given_up() -> None:
    """The self-test at start must fail, not hang, where ranks cannot see each other's flags."""
    peers = Peers(BLOCK)
    x = torch.ones(8)
    one_shot_all_reduce(x, peers.buffers[0], out=x, adds=False, max_spins=3)
    assert peers.buffers[0].failures.tolist() == [0, 1, 1]
