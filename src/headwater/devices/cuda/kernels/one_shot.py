"""A sum over the ranks of one host in one kernel: each reads the numbers of all others over NVLink.

Each rank has a buffer that the others can address. A block of the kernel copies its part of the message there, raises
its flag at the others, waits for theirs, and adds up all parts in the order of the ranks, in float32. NCCL passes a
message on in steps, which take longer than the message if that is small.

Calls alternate between two data areas. A block that writes to one again has seen all flags of the call in
between, which the others raised after reading. Flags are call numbers, so nothing has to be set back.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl

BLOCK = 2048  # numbers of a block: 16 bytes of each thread for 16-bit numbers
_FLAG_ALIGNMENT = 256
_PART_BYTES = 4 * BLOCK  # of a block, whatever its numbers: only equal blocks of two calls wait for each other


class OneShotBuffers:
    """What a rank needs for messages of up to `max_numbers`: its own buffer and the addresses of all."""

    def __init__(self, *, rank: int, size: int, max_numbers: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.max_numbers = max_numbers
        self.max_blocks = triton.cdiv(max_numbers, BLOCK)
        self.flag_bytes = triton.cdiv(4 * self.max_blocks * size, _FLAG_ALIGNMENT) * _FLAG_ALIGNMENT
        self.area_bytes = self.max_blocks * _PART_BYTES
        self.num_bytes = self.flag_bytes + 2 * self.area_bytes
        self.counters = torch.zeros(self.max_blocks, dtype=torch.int32, device=device)
        self.failures = torch.zeros(size, dtype=torch.int32, device=device)  # waits for each rank that were given up
        self.addresses: torch.Tensor | None = None  # int64[size], of buffers that were zeros


def one_shot_all_reduce(
    x: torch.Tensor, buffers: OneShotBuffers, *, out: torch.Tensor, adds: bool, max_spins: int = -1
) -> None:
    """out = the sum of x over all ranks, or out += it with `adds`. Contiguous; x may be `out` without `adds`.

    A wait is given up after `max_spins` looks (-1: never) and counted in `buffers.failures`.
    """
    assert x.is_contiguous() and out.is_contiguous() and x.numel() == out.numel() <= buffers.max_numbers
    _one_shot_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x,
        out,
        buffers.addresses,
        buffers.counters,
        buffers.failures,
        x.numel(),
        max_spins,
        RANK=buffers.rank,
        SIZE=buffers.size,
        FLAG_BYTES=buffers.flag_bytes,
        AREA_BYTES=buffers.area_bytes,
        PART_BYTES=_PART_BYTES,
        ADDS=adds,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["max_spins"])  # what was tested is what runs
def _one_shot_kernel(
    x,
    out,
    addresses,
    counters,
    failures,
    num,
    max_spins,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    AREA_BYTES: tl.constexpr,
    PART_BYTES: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    at = block * BLOCK + lanes
    inside = at < num
    call = tl.load(counters + block) + 1
    start = FLAG_BYTES + (call & 1) * AREA_BYTES + block * PART_BYTES
    own_address = tl.load(addresses + RANK)
    own = tl.load(x + at, mask=inside, other=0.0)
    # areas and parts begin at multiples of 256 bytes, so a thread moves 16 bytes at once
    shown = tl.multiple_of((own_address + start).to(tl.pointer_type(x.dtype.element_ty)), 16)
    tl.store(shown + lanes, own, mask=inside)
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flags = tl.load(addresses + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + block * SIZE + RANK, call, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = own_address.to(tl.pointer_type(tl.int32)) + block * SIZE + peer
            ahead = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - call  # call numbers may wrap around
            spins = 0
            while (ahead < 0) & (spins != max_spins):
                ahead = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - call
                spins += 1
            if ahead < 0:
                tl.atomic_add(failures + peer, 1)
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += own.to(tl.float32)
        else:
            part = tl.multiple_of((tl.load(addresses + peer) + start).to(tl.pointer_type(x.dtype.element_ty)), 16)
            total += tl.load(part + lanes, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    if ADDS:
        total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    tl.store(counters + block, call)
