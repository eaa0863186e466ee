"""Drawing tokens from logits as one Triton kernel: temperature, top-k, top-p, min-p and seeded noise per row.

Nothing is sorted and nothing is asked of the host. The least probable logit that top-k and top-p keep is found by
radix selection: two bits of it in each pass over the row, by the counts (top-k) or the probabilities (top-p) above
four bounds. A row may have a mask of one bit per token: forbidden logits become -inf in the first pass. Rows with and
without masks go together, because the time of a launch hardly depends on their number. The noise is devices/noise.py's,
so a seed draws the same everywhere from the same logits.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

_BLOCK = 8192


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    params: torch.Tensor,
    *,
    newest: torch.Tensor,
    result: torch.Tensor,
    masks: torch.Tensor | None = None,
) -> None:
    """One token for each of N `rows` (int32) of float32 `logits` [R, vocab_size].

    `params` is int32[7, N]: temperature, top_p and log(min_p) as float32 bits, top_k (0: all), the noise's key as
    two halves, and the row's index in `masks` (-1: none). A temperature of 0 takes the largest. A token goes to
    result[0, row] and to newest[slot]. `masks` is int32[M, at least vocab_size / 32]: bit t % 32 of word t // 32
    allows token t. A mask edits the logits of its row.
    """
    _draw_kernel[(len(rows),)](
        logits,
        rows,
        slots,
        params,
        newest,
        result,
        logits if masks is None else masks,
        logits.shape[1],
        params.stride(0),
        0 if masks is None else masks.stride(0),
        0,
        logits.shape[1] - 1,
        HAS_MASKS=masks is not None,
        IS_PART=False,
        BLOCK=_BLOCK,
        num_warps=32,
    )


def draw_part(
    logits: torch.Tensor, rows: torch.Tensor, params: torch.Tensor, *, first_token: int, max_token: int
) -> torch.Tensor:
    """What `draw_tokens` would draw if there were only these tokens, `first_token` and those after it.

    Of rows that draw from all tokens: temperature above 0, no top_k, top_p, min_p or mask. int32[2, N]: the score of
    each row's token, as the bits of a float32, and the token, at most `max_token`. The best score of all parts is that
    of the token that `draw_tokens` draws.
    """
    found = torch.empty((2, len(rows)), dtype=torch.int32, device=logits.device)
    _draw_kernel[(len(rows),)](
        logits,
        rows,
        rows,
        params,
        found[0],
        found[1],
        logits,
        logits.shape[1],
        params.stride(0),
        0,
        first_token,
        max_token,
        HAS_MASKS=False,
        IS_PART=True,
        BLOCK=_BLOCK,
        num_warps=32,
    )
    return found


@triton.jit
def _ordered(x):
    """float32 as uint32 of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def _mixed(x):
    """Wellons' lowbias32 integer hash, as in noise.py."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log_noise(ids, low, high):
    """log of Exponential(1) variates."""
    bits = _mixed(_mixed(ids.to(tl.uint32) ^ low) + high) & 0x7FFFFFFF
    u = tl.minimum(bits.to(tl.int32).to(tl.float32) * (1.0 / 2147483648.0) + 1.0 / 4294967296.0, 1.0 - 1.0 / 16777216.0)
    # -log(1 - u) without losing small u, which decide who wins
    y = 1.0 - u
    e = tl.where(y == 1.0, u, -tl.log(y) * (u / tl.where(y == 1.0, 1.0, 1.0 - y)))
    return tl.log(e)


@triton.jit
def _lowest_kept(x_row, vocab_size, inverse, largest, floor, wanted, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key for which the logits at or above it (and `floor`) number, or sum up to, at least `wanted`.

    Probabilities are relative to that of `largest`. Keys are `_ordered` scaled logits.
    """
    digits = tl.arange(0, 4).to(tl.uint32)
    found = floor * 0
    for step in range(16):
        bounds = found | (digits << (30 - 2 * step))
        sums = tl.zeros((4, BLOCK), tl.float32)
        for first in range(0, vocab_size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(x_row + at, mask=at < vocab_size, other=-float("inf")) * inverse
            key = _ordered(x)
            if BY_COUNT:
                weight = (x == x).to(tl.float32)
            else:
                weight = tl.exp(x - largest)
            weight = tl.where((key >= floor) & (at < vocab_size), weight, 0.0)
            sums += tl.where(key[None, :] >= bounds[:, None], weight[None, :], 0.0)
        totals = tl.sum(sums, 1)
        digit = tl.max(tl.where(totals >= wanted, digits.to(tl.int32), 0), 0).to(tl.uint32)
        found = found | (digit << (30 - 2 * step))
    return tl.maximum(found, floor)


@triton.jit(do_not_specialize=["stride", "first_token", "max_token"])
def _draw_kernel(
    logits,
    rows,
    slots,
    numbers,
    newest,
    tokens,
    masks,
    vocab_size,
    stride,
    mask_stride,
    first_token,
    max_token,
    HAS_MASKS: tl.constexpr,
    IS_PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    row = tl.load(rows + index)
    x_row = logits + row.to(tl.int64) * vocab_size
    temperature = tl.load(numbers + index).to(tl.float32, bitcast=True)
    top_p = tl.load(numbers + stride + index).to(tl.float32, bitcast=True)
    log_min_p = tl.load(numbers + 2 * stride + index).to(tl.float32, bitcast=True)
    top_k = tl.load(numbers + 3 * stride + index)
    low = tl.load(numbers + 4 * stride + index).to(tl.uint32, bitcast=True)
    high = tl.load(numbers + 5 * stride + index).to(tl.uint32, bitcast=True)
    mask = tl.load(numbers + 6 * stride + index)
    is_random = temperature > 0.0
    inverse = 1.0 / tl.where(is_random, temperature, 1.0)

    maxima = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_row + at, mask=at < vocab_size, other=-float("inf"))
        if HAS_MASKS:
            is_masked = at < tl.where(mask >= 0, vocab_size, 0)
            word = tl.load(masks + mask.to(tl.int64) * mask_stride + (at >> 5), mask=is_masked, other=-1)
            x = tl.where((word >> (at & 31)) & 1 != 0, x, -float("inf"))
            tl.store(x_row + at, x, mask=is_masked)
        maxima = tl.maximum(maxima, x * inverse)
    if HAS_MASKS:
        tl.debug_barrier()  # other threads of the program read what this one wrote
    largest = tl.max(maxima, 0)

    floor = _ordered(largest) * 0
    if is_random & (top_k > 0) & (top_k < vocab_size):
        floor = _lowest_kept(x_row, vocab_size, inverse, largest, floor, top_k.to(tl.float32), True, BLOCK)
    if is_random & (top_p < 1.0):
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocab_size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(x_row + at, mask=at < vocab_size, other=-float("inf")) * inverse
            sums += tl.where(_ordered(x) >= floor, tl.exp(x - largest), 0.0)
        wanted = top_p * tl.sum(sums, 0)
        floor = _lowest_kept(x_row, vocab_size, inverse, largest, floor, wanted, False, BLOCK)

    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab_size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_row + at, mask=at < vocab_size, other=-float("inf")) * inverse
        is_kept = (_ordered(x) >= floor) & (x - largest >= log_min_p)
        value = x
        if is_random:
            value = tl.where(is_kept, x - _log_noise(at + first_token, low, high), -float("inf"))
        is_better = value > best  # the first of equals stays
        best = tl.where(is_better, value, best)
        best_at = tl.where(is_better, at, best_at)
    winner = tl.max(best, 0)
    token = tl.min(tl.where(best == winner, best_at, 2147483647), 0)
    token = tl.minimum(token + first_token, max_token)  # of a row of NaN, which fails anyway
    if IS_PART:
        tl.store(newest + index, winner.to(tl.int32, bitcast=True))
        tl.store(tokens + index, token)
    else:
        tl.store(tokens + row, token)
        tl.store(newest + tl.load(slots + index), token)
