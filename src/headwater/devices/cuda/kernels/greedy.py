"""The greedy choice of a step's tokens: one Triton kernel for all rows, and one for rows that have masks.

The first runs with every step and also looks for logits that are not finite. The second chooses again, among the tokens
that a mask of one bit per token allows, and reads little more than the mask where few are allowed.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

_BLOCK = 4096


class GreedyScratch:
    """Partial maxima of the vocabulary's blocks, for up to `max_rows` rows. Kernels of one stream share it."""

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.num_blocks = triton.cdiv(vocab_size, _BLOCK)
        shape = (max_rows, self.num_blocks)
        self.values = torch.empty(shape, dtype=torch.float32, device=device)
        self.ids = torch.empty(shape, dtype=torch.int32, device=device)
        # Zero between kernels: the program that ends a row sets its counter back.
        self.counters = torch.zeros(max_rows, dtype=torch.int32, device=device)


def choose_greedy(
    logits: torch.Tensor, slots: torch.Tensor, *, newest: torch.Tensor, result: torch.Tensor, scratch: GreedyScratch
) -> None:
    """The first largest of each row of float32 `logits` [R, vocab_size] into result[0], int32[2, at least R].

    result[1] becomes 1 where all logits are finite, else 0. newest[slots[row]] becomes the token as well.
    """
    num_rows, vocab_size = logits.shape
    _greedy_kernel[(scratch.num_blocks, num_rows)](
        logits,
        slots,
        newest,
        result,
        result[1],
        scratch.values,
        scratch.ids,
        scratch.counters,
        vocab_size,
        NUM_BLOCKS=scratch.num_blocks,
        BLOCKS=triton.next_power_of_2(scratch.num_blocks),
        BLOCK=_BLOCK,
        num_warps=4,
    )


def choose_allowed(
    logits: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    masks: torch.Tensor,
    *,
    newest: torch.Tensor,
    result: torch.Tensor,
    scratch: GreedyScratch,
) -> None:
    """The first largest allowed logit in each of N `rows` (int32) of float32 `logits` [R, vocab_size].

    `masks` is int32[N, at least vocab_size / 32]: bit t % 32 of word t // 32 allows token t. A token goes to
    result[0, row] and to newest[slot]; result[1] stays as it is.
    """
    _allowed_kernel[(scratch.num_blocks, len(rows))](
        logits,
        rows,
        slots,
        masks,
        newest,
        result,
        scratch.values,
        scratch.ids,
        scratch.counters,
        logits.shape[1],
        masks.stride(0),
        NUM_BLOCKS=scratch.num_blocks,
        BLOCKS=triton.next_power_of_2(scratch.num_blocks),
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _best_of_blocks(values, ids, first, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The id of the largest of a row's partial maxima, which begin at `first`, and how many of them are NaN."""
    blocks = tl.arange(0, BLOCKS)
    best = tl.load(values + first + blocks, mask=blocks < NUM_BLOCKS, other=-float("inf"), cache_modifier=".cg")
    num_bad = tl.sum((best != best).to(tl.int32), 0)
    _, winner = tl.max(tl.where(best == best, best, -float("inf")), 0, return_indices=True)
    return tl.load(ids + first + winner, cache_modifier=".cg"), num_bad


@triton.jit
def _greedy_kernel(
    logits,
    slots,
    newest,
    tokens,
    is_finite,
    values,
    ids,
    counters,
    vocab_size,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * vocab_size + at, mask=at < vocab_size, other=-3.0e38)
    num_bad = tl.sum((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 0)
    value, index = tl.max(x, 0, return_indices=True)
    part = row * NUM_BLOCKS + block
    # A block with a number that is not finite says so with NaN, which no maximum of the others hides.
    tl.store(values + part, tl.where(num_bad > 0, float("nan"), value))
    tl.store(ids + part, block * BLOCK + index)
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == NUM_BLOCKS - 1:
        tl.debug_barrier()
        tl.store(counters + row, 0)
        token, num_bad = _best_of_blocks(values, ids, row * NUM_BLOCKS, NUM_BLOCKS, BLOCKS)
        token = tl.where(num_bad > 0, 0, token)
        tl.store(tokens + row, token)
        tl.store(is_finite + row, (num_bad == 0).to(tl.int32))
        tl.store(newest + tl.load(slots + row), token)


@triton.jit
def _allowed_kernel(
    logits,
    rows,
    slots,
    masks,
    newest,
    tokens,
    values,
    ids,
    counters,
    vocab_size,
    mask_stride,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, index = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + index)
    at = block * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(masks + index.to(tl.int64) * mask_stride + (at >> 5), mask=at < vocab_size, other=0)
    is_allowed = (word >> (at & 31)) & 1 != 0
    x = tl.load(logits + row.to(tl.int64) * vocab_size + at, mask=is_allowed, other=-float("inf"))
    x = tl.where(x == x, x, -float("inf"))  # a row with NaN fails anyway, but its token must be one
    value, best_at = tl.max(x, 0, return_indices=True)
    part = index * NUM_BLOCKS + block
    tl.store(values + part, value)
    tl.store(ids + part, block * BLOCK + best_at)
    tl.debug_barrier()
    if tl.atomic_add(counters + index, 1, sem="acq_rel") == NUM_BLOCKS - 1:
        tl.debug_barrier()
        tl.store(counters + index, 0)
        token, _ = _best_of_blocks(values, ids, index * NUM_BLOCKS, NUM_BLOCKS, BLOCKS)
        tl.store(tokens + row, token)
        tl.store(newest + tl.load(slots + index), token)
