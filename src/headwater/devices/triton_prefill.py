"""Paged attention of prompt chunks as a Triton kernel (FlashAttention-2, arXiv 2307.08691).

A program takes a tile of queries for all query heads of one KV head, so that keys and values are read once for the
whole group. Chunks of any length over any cached prefix go in one launch; a list of tiles says which is whose.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory
from headwater.devices.paged_batch import PagedBatch
from headwater.devices.triton_launch import Launcher, alignment

_LINES = 128  # (query, head of the group) pairs of a tile; half of them where heads are larger than 128
_KEYS = 64  # tokens at a time
_NUM_WARPS = 4
_NUM_STAGES = 3


def queries_per_tile(geometry: AttentionGeometry) -> int:
    """Queries that one program computes. ValueError for a group of heads that does not fit in a tile."""
    lines = _lines(geometry.head_dim)
    num_queries = lines // (geometry.num_heads // geometry.num_kv_heads)
    if num_queries < 1:
        raise ValueError(f"at most {lines} query heads may share a KV head on this device")
    return num_queries


def _lines(head_dim: int) -> int:
    return _LINES if head_dim <= 128 else _LINES // 2


def tiles(
    query_lens: npt.NDArray[np.int32], context_lens: npt.NDArray[np.int32], num_queries: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(row, first query) of every tile, those with the most keys first: they take longest."""
    num_tiles = -(-query_lens // num_queries)
    rows = np.repeat(np.arange(len(query_lens), dtype=np.int32), num_tiles)
    ends = np.cumsum(num_tiles)
    starts = (np.arange(len(rows)) - (ends - num_tiles)[rows]) * num_queries
    order = np.argsort(-((context_lens - query_lens)[rows] + starts), kind="stable")
    return rows[order], starts[order].astype(np.int32)


def prefill(
    qkv: torch.Tensor,
    out: torch.Tensor,
    geometry: AttentionGeometry,
    batch: PagedBatch,
    *,
    kv: KVMemory,
    layer: int,
) -> None:
    """Attention of the batch's chunks, whose queries in `qkv` are rotated and whose keys and values are written."""
    chunks = batch.chunks
    assert chunks is not None
    head_dim = geometry.head_dim
    keys, num_warps, num_stages = _KEYS, _NUM_WARPS, _NUM_STAGES
    if qkv.dtype == torch.float32:  # for tests; takes twice the space: small blocks of keys, none loaded ahead
        keys, num_warps, num_stages = 32, 8, 1
    group, page_size = geometry.num_heads // geometry.num_kv_heads, kv.layout.page_size
    table_stride = batch.tables.stride(0)
    page_stride, layer_offset = kv.pages.stride(0), layer * kv.pages.stride(1)
    aligned = alignment(qkv, layer_offset, page_stride, table_stride)
    sizes = (geometry.num_kv_heads, group, head_dim, page_size)
    _launch_prefill(
        (len(chunks.tile_rows), geometry.num_kv_heads),
        qkv,
        out,
        kv.pages,
        batch.tables,
        chunks.slots,
        chunks.starts,
        chunks.lens,
        chunks.contexts,
        chunks.tile_rows,
        chunks.tile_starts,
        layer_offset,
        page_stride,
        table_stride,
        math.log2(math.e) / math.sqrt(head_dim),
        geometry.num_kv_heads,
        group,
        head_dim,
        max(16, triton.next_power_of_2(head_dim)),
        page_size,
        _lines(head_dim),
        keys,
        key=(qkv.device.index, qkv.dtype, sizes, aligned, table_stride == 1),
        num_warps=num_warps,
        num_stages=num_stages,
    )


@triton.jit
def _attend(
    q,
    acc,
    best,
    total,
    positions,
    first,
    end,
    table,
    pages,
    page_stride,
    scale,
    VALUES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take in keys [first, first + KEYS); masked: those below `end` that do not come after their query."""
    keys = first + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM_BLOCK)
    is_dim = dim[None, :] < DIM
    if IS_MASKED:
        page = tl.load(table + keys // PAGE_SIZE, mask=keys < end, other=0).to(tl.int64)
    else:
        page = tl.load(table + keys // PAGE_SIZE).to(tl.int64)
    at = (pages + page * page_stride + (keys % PAGE_SIZE) * DIM)[:, None] + dim[None, :]
    is_in = is_dim
    if IS_MASKED:
        is_in = is_dim & (keys[:, None] < end)
    k = tl.load(at, mask=is_in, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if IS_MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, -float("inf"))
    larger = tl.maximum(best, tl.max(scores, 1) * scale)
    shrink = tl.exp2(best - larger)
    weights = tl.exp2(scores * scale - larger[:, None])
    total = total * shrink + tl.sum(weights, 1)
    v = tl.load(at + VALUES, mask=is_in, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, larger, total


@triton.jit
def _prefill_kernel(
    qkv,
    out,
    kv,
    tables,
    row_slots,
    row_starts,
    row_lens,
    row_contexts,
    tile_rows,
    tile_starts,
    layer_offset,
    page_stride,
    table_stride,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
):
    QUERIES: tl.constexpr = LINES // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    VALUES: tl.constexpr = NUM_KV_HEADS * PAGE_SIZE * DIM
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_rows + tile)
    first_query = tl.load(tile_starts + tile)
    num_queries, context = tl.load(row_lens + row), tl.load(row_contexts + row)
    past = context - num_queries
    table = tables + tl.load(row_slots + row).to(tl.int64) * table_stride
    pages = kv + layer_offset + kv_head * PAGE_SIZE * DIM

    line, dim = tl.arange(0, LINES), tl.arange(0, DIM_BLOCK)
    query = first_query + line // GROUP
    is_query = (line < QUERIES * GROUP) & (query < num_queries)
    token = (tl.load(row_starts + row) + query).to(tl.int64)
    head = kv_head * GROUP + line % GROUP
    is_in = is_query[:, None] & (dim[None, :] < DIM)
    q_at = token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM) + head * DIM
    q = tl.load(qkv + q_at[:, None] + dim[None, :], mask=is_in, other=0.0)

    positions = past + query
    end = tl.minimum(past + first_query + QUERIES, context)
    whole = (past + first_query + 1) // KEYS * KEYS  # keys that every query of the tile may see
    best = tl.full((LINES,), -float("inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float32)
    acc = tl.zeros((LINES, DIM_BLOCK), tl.float32)
    for first in range(0, whole, KEYS):
        acc, best, total = _attend(
            q, acc, best, total, positions, first, end, table, pages, page_stride, scale,
            VALUES, DIM, DIM_BLOCK, PAGE_SIZE, KEYS, False,
        )  # fmt: skip
    for first in range(whole, end, KEYS):
        acc, best, total = _attend(
            q, acc, best, total, positions, first, end, table, pages, page_stride, scale,
            VALUES, DIM, DIM_BLOCK, PAGE_SIZE, KEYS, True,
        )  # fmt: skip
    o_at = token * (NUM_HEADS * DIM) + head * DIM
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + o_at[:, None] + dim[None, :], result, mask=is_in)


_launch_prefill = Launcher(_prefill_kernel)
