"""Copies scattered pages within device memory, or to and from registered host memory, in one launch."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

# Enough in flight to fill a PCIe link, few enough that the step beside them keeps most of the multiprocessors: twice as
# many programs move no more, and make a step beside them half as long again.
_BLOCK_WORDS = 1024
_NUM_PROGRAMS = 24


def copy_pages(
    source: torch.Tensor,
    source_pages: torch.Tensor,
    target: torch.Tensor,
    target_pages: torch.Tensor,
    *,
    num_programs: int = _NUM_PROGRAMS,
) -> None:
    """target[target_pages[i]] = source[source_pages[i]] on the current stream.

    `source` and `target` are int64[pages, words] on the device or in host memory that the driver has mapped, rows of
    the same stride in both; the page lists are int32 on the device.
    """
    words, stride = source.shape[1], source.stride(0)
    assert target.shape[1] == words and target.stride(0) == stride and len(source_pages) == len(target_pages)
    pieces = triton.cdiv(words, _BLOCK_WORDS)
    _copy_pages[(min(num_programs, len(source_pages) * pieces),)](
        source,
        source_pages,
        target,
        target_pages,
        len(source_pages) * pieces,
        WORDS=words,
        STRIDE=stride,
        PIECES=pieces,
        BLOCK=_BLOCK_WORDS,
        num_warps=8,
    )


@triton.jit
def _copy_pages(
    source,
    source_pages,
    target,
    target_pages,
    num_pieces,
    WORDS: tl.constexpr,
    STRIDE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        page = piece // PIECES
        offsets = (piece % PIECES) * BLOCK + tl.arange(0, BLOCK)
        start = tl.load(source_pages + page).to(tl.int64) * STRIDE
        stop = tl.load(target_pages + page).to(tl.int64) * STRIDE
        if WORDS % BLOCK == 0:  # no masks where none are needed
            tl.store(target + stop + offsets, tl.load(source + start + offsets))
        else:
            values = tl.load(source + start + offsets, mask=offsets < WORDS)
            tl.store(target + stop + offsets, values, mask=offsets < WORDS)
