"""Copies some heads of scattered pages between two memories whose pages hold different numbers of heads."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl

_MAX_BLOCK_WORDS = 1024
_NUM_PROGRAMS = 24  # as for whole pages (page_copy.py)
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def copy_heads(
    source: torch.Tensor, source_pages: torch.Tensor, target: torch.Tensor, target_pages: torch.Tensor
) -> None:
    """target[target_pages[i]] = source[source_pages[i]] on the current stream.

    `source` and `target` are views uint8[pages, layers, 2 (K, V), bytes of the heads], contiguous in the last dimension
    only. They lie on the device or in host memory that the driver has mapped. The page lists are int32 on the device.
    """
    assert source.shape[1:] == target.shape[1:] and len(source_pages) == len(target_pages)
    both = (source, target)
    word_bytes = math.gcd(8, source.shape[-1], *(n for it in both for n in (*it.stride()[:3], it.storage_offset())))
    source, target = (it.view(_WORDS[word_bytes]) for it in both)
    num_layers, words = source.shape[1], source.shape[-1]
    block = min(_MAX_BLOCK_WORDS, triton.next_power_of_2(words))
    pieces = triton.cdiv(words, block)
    num_pieces = len(source_pages) * num_layers * 2 * pieces
    _copy_heads[(min(_NUM_PROGRAMS, num_pieces),)](
        source,
        source_pages,
        target,
        target_pages,
        num_layers,
        num_pieces,
        SOURCE_PAGE=source.stride(0),
        SOURCE_LAYER=source.stride(1),
        SOURCE_KV=source.stride(2),
        TARGET_PAGE=target.stride(0),
        TARGET_LAYER=target.stride(1),
        TARGET_KV=target.stride(2),
        WORDS=words,
        PIECES=pieces,
        BLOCK=block,
        num_warps=8,
    )


@triton.jit
def _copy_heads(
    source,
    source_pages,
    target,
    target_pages,
    num_layers,
    num_pieces,
    SOURCE_PAGE: tl.constexpr,
    SOURCE_LAYER: tl.constexpr,
    SOURCE_KV: tl.constexpr,
    TARGET_PAGE: tl.constexpr,
    TARGET_LAYER: tl.constexpr,
    TARGET_KV: tl.constexpr,
    WORDS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        row = piece // PIECES  # the keys or the values of a layer of a page
        page, layer, kv = row // (2 * num_layers), row // 2 % num_layers, row % 2
        offsets = (piece % PIECES) * BLOCK + tl.arange(0, BLOCK)
        start = tl.load(source_pages + page).to(tl.int64) * SOURCE_PAGE + layer * SOURCE_LAYER + kv * SOURCE_KV
        stop = tl.load(target_pages + page).to(tl.int64) * TARGET_PAGE + layer * TARGET_LAYER + kv * TARGET_KV
        if WORDS % BLOCK == 0:  # no masks where none are needed
            tl.store(target + stop + offsets, tl.load(source + start + offsets))
        else:
            values = tl.load(source + start + offsets, mask=offsets < WORDS)
            tl.store(target + stop + offsets, values, mask=offsets < WORDS)
