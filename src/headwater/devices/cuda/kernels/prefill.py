"""Paged attention of prompt chunks as a Triton kernel (FlashAttention-2, arXiv 2307.08691).

A program takes a tile of queries for all query heads of one KV head, so that keys and values are read once for the
whole group. Chunks of any length over any cached prefix go in one launch; a list of tiles says which is whose. Where
few tiles have long contexts, a program takes a piece of one, and a second kernel joins the pieces (prefill_tiles.py).
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import math

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.float8 import power_of_two
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.sinks import load_sinks, with_sink
from headwater.devices.cuda.paged_batch import PagedBatch
from headwater.devices.cuda.prefill_tiles import MAX_PIECES
from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory

_LINES = 128  # (query, head of the group) pairs of a tile; half of them where heads are larger than 128
_KEYS = 64  # tokens at a time
_NUM_WARPS = 4
_NUM_STAGES = 3
_FLOAT32 = 32, 8  # keys and warps
_LARGE_FLOAT32 = 16, 4  # of heads larger than 128; with 8 warps Triton 3.6 reads beyond the shared memory on Hopper
_JOINED_LINES = 2  # lines of a tile that one program of the join takes
_JOINED_PARTS = 16  # and parts of each at once


def queries_per_tile(geometry: AttentionGeometry) -> int:
    """Queries that one program computes. ValueError for a group of heads that does not fit in a tile."""
    lines = _lines(geometry.head_dim)
    num_queries = lines // (geometry.num_heads // geometry.num_kv_heads)
    if num_queries < 1:
        raise ValueError(f"at most {lines} query heads may share a KV head on this device")
    return num_queries


def _lines(head_dim: int) -> int:
    return _LINES if head_dim <= 128 else _LINES // 2


class PrefillScratch:
    """Partial results of tiles that are cut into pieces. Reused by every layer and step."""

    def __init__(self, *, max_parts: int, geometry: AttentionGeometry, device: torch.device) -> None:
        num_lines = max_parts * geometry.num_kv_heads * _lines(geometry.head_dim)
        self.partials = torch.empty((num_lines, geometry.head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(num_lines, dtype=torch.float32, device=device)


def prefill(
    qkv: torch.Tensor,
    out: torch.Tensor,
    geometry: AttentionGeometry,
    batch: PagedBatch,
    *,
    kv: KVMemory,
    layer: int,
    scratch: PrefillScratch,
    masks_all: bool = False,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of the batch's chunks, whose queries in `qkv` are rotated and whose keys and values are written.

    `masks_all`: every block of keys goes the way of the last ones, so that a query's arithmetic does not depend on
    which others are in its tile.
    """
    chunks = batch.chunks
    assert chunks is not None
    head_dim = geometry.head_dim
    keys, num_warps, num_stages = _KEYS, _NUM_WARPS, _NUM_STAGES
    if qkv.dtype == torch.float32:  # for tests; takes twice the space: small blocks of keys, none loaded ahead
        keys, num_warps, num_stages = (*(_FLOAT32 if head_dim <= 128 else _LARGE_FLOAT32), 1)
    group, page_size = geometry.num_heads // geometry.num_kv_heads, kv.layout.page_size
    table_stride = batch.tables.stride(0)
    page_stride, layer_offset = kv.pages.stride(0), layer * kv.pages.stride(1)
    exponents = kv.pages if kv.exponents is None else kv.exponents
    aligned = alignment(qkv, exponents, layer_offset, page_stride, table_stride)
    sizes = (geometry.num_kv_heads, group, head_dim, page_size)
    window = geometry.layer(layer).window
    of_sinks = () if sinks is None else (sinks.dtype, *alignment(sinks))
    _launch_prefill(
        (len(chunks.tiles), geometry.num_kv_heads),
        qkv,
        out,
        kv.pages,
        exponents,
        batch.tables,
        chunks.slots,
        chunks.starts,
        chunks.lens,
        chunks.contexts,
        chunks.tiles,
        qkv if sinks is None else sinks,
        scratch.partials,
        scratch.lse,
        layer_offset,
        page_stride,
        table_stride,
        math.log2(math.e) * geometry.scale,
        window or 0,
        geometry.num_kv_heads,
        group,
        head_dim,
        max(16, triton.next_power_of_2(head_dim)),
        page_size,
        _lines(head_dim),
        keys,
        kv.exponents is not None,
        masks_all,
        window is not None,
        sinks is not None,
        key=(
            qkv.device.index,
            qkv.dtype,
            kv.layout.dtype,
            sizes,
            aligned,
            table_stride == 1,
            masks_all,
            window,
            of_sinks,
        ),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if len(chunks.joins):
        _launch_join(
            (len(chunks.joins), geometry.num_kv_heads, _lines(head_dim) // _JOINED_LINES),
            out,
            chunks.starts,
            chunks.lens,
            chunks.joins,
            qkv if sinks is None else sinks,
            scratch.partials,
            scratch.lse,
            geometry.num_kv_heads,
            group,
            head_dim,
            max(16, triton.next_power_of_2(head_dim)),
            _lines(head_dim),
            _JOINED_LINES,
            MAX_PIECES,
            _JOINED_PARTS,
            sinks is not None,
            key=(qkv.device.index, qkv.dtype, sizes, of_sinks, *alignment(qkv)),
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
    exponents,
    page_stride,
    scale,
    window,
    VALUES: tl.constexpr,
    VALUE_EXPONENTS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Add keys [first, first + KEYS) to the running softmax; if masked, those below `end` and not after the query.

    With a window, only those in the query's window, of which it may see none yet.
    """
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
    k = tl.load(at, mask=is_in, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if IS_SCALED:
        exponent_at = exponents + page * page_stride + keys % PAGE_SIZE
        of_keys = tl.load(exponent_at, mask=keys < end, other=0) if IS_MASKED else tl.load(exponent_at)
        exponent_at += VALUE_EXPONENTS
        of_values = tl.load(exponent_at, mask=keys < end, other=0) if IS_MASKED else tl.load(exponent_at)
        scores = scores * (power_of_two(of_keys) * scale)[None, :] + of_values.to(tl.float32)[None, :]
        scale = 1.0
    if IS_MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, -float("inf"))
    if HAS_WINDOW:
        scores = tl.where(keys[None, :] > positions[:, None] - window, scores, -float("inf"))
    larger = tl.maximum(best, tl.max(scores, 1) * scale)
    subtracted = larger
    if HAS_WINDOW:
        subtracted = tl.where(larger == -float("inf"), 0.0, larger)
    shrink = tl.exp2(best - subtracted)
    weights = tl.exp2(scores * scale - subtracted[:, None])  # with 8 bits, the value's power of two is in it
    if IS_SCALED:
        total = total * shrink + tl.sum(weights * power_of_two(-of_values.to(tl.int32))[None, :], 1)
    else:
        total = total * shrink + tl.sum(weights, 1)
    v = tl.load(at + VALUES, mask=is_in, other=0.0).to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, larger, total


@triton.jit
def _prefill_kernel(
    qkv,
    out,
    kv,
    exponents,
    tables,
    row_slots,
    row_starts,
    row_lens,
    row_contexts,
    tiles,
    sinks,
    partials,
    lses,
    layer_offset,
    page_stride,
    table_stride,
    scale,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    MASKS_ALL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    QUERIES: tl.constexpr = LINES // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    VALUES: tl.constexpr = NUM_KV_HEADS * PAGE_SIZE * DIM
    tile, kv_head = tiles + tl.program_id(0) * 5, tl.program_id(1)
    row, first_query = tl.load(tile), tl.load(tile + 1)
    start, end, part = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    if end == 0:  # padding
        return
    num_queries, context = tl.load(row_lens + row), tl.load(row_contexts + row)
    past = context - num_queries
    table = tables + tl.load(row_slots + row).to(tl.int64) * table_stride
    pages = kv + layer_offset + kv_head * PAGE_SIZE * DIM
    exponents += layer_offset + kv_head * PAGE_SIZE

    line, dim = tl.arange(0, LINES), tl.arange(0, DIM_BLOCK)
    query = first_query + line // GROUP
    is_query = (line < QUERIES * GROUP) & (query < num_queries)
    token = (tl.load(row_starts + row) + query).to(tl.int64)
    head = kv_head * GROUP + line % GROUP
    is_in = is_query[:, None] & (dim[None, :] < DIM)
    q_at = token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM) + head * DIM
    q = tl.load(qkv + q_at[:, None] + dim[None, :], mask=is_in, other=0.0)

    if IS_SCALED and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # what 8-bit floats are widened to in one instruction

    positions = past + query
    whole = tl.minimum(past + first_query + 1, end) // KEYS * KEYS  # keys that every query of the tile may see
    if HAS_WINDOW:
        start = tl.maximum(start, (past + first_query + 1 - window) // KEYS * KEYS)
        whole = tl.maximum(whole, start)
    if MASKS_ALL:
        whole = start
    best = tl.full((LINES,), -float("inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float32)
    acc = tl.zeros((LINES, DIM_BLOCK), tl.float32)
    for first in range(start, whole, KEYS):
        acc, best, total = _attend(
            q, acc, best, total, positions, first, end, table, pages, exponents, page_stride, scale, window,
            VALUES, NUM_KV_HEADS * PAGE_SIZE, DIM, DIM_BLOCK, PAGE_SIZE, KEYS, IS_SCALED, False, HAS_WINDOW,
        )  # fmt: skip
    for first in range(whole, end, KEYS):
        acc, best, total = _attend(
            q, acc, best, total, positions, first, end, table, pages, exponents, page_stride, scale, window,
            VALUES, NUM_KV_HEADS * PAGE_SIZE, DIM, DIM_BLOCK, PAGE_SIZE, KEYS, IS_SCALED, True, HAS_WINDOW,
        )  # fmt: skip
    if HAS_WINDOW:  # nothing is seen of a piece before the window: no weight in the join, as best is -inf
        total = tl.where(total == 0.0, 1.0, total)
    if HAS_SINKS:  # noqa: SIM102  decided when it is compiled
        if part < 0:
            acc, total = with_sink(acc, best, total, load_sinks(sinks + head, is_query))
    result = acc / total[:, None]
    if part >= 0:
        at = (part.to(tl.int64) * NUM_KV_HEADS + kv_head) * LINES + line
        tl.store(partials + at[:, None] * DIM + dim[None, :], result, mask=is_in)
        tl.store(lses + at, best + tl.log2(total), mask=is_query)
        return
    o_at = token * (NUM_HEADS * DIM) + head * DIM
    tl.store(out + o_at[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _join_kernel(
    out,
    row_starts,
    row_lens,
    joins,
    sinks,
    partials,
    lses,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    JOINED: tl.constexpr,
    PIECES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    join, kv_head = joins + tl.program_id(0) * 4, tl.program_id(1)
    row, first_query = tl.load(join), tl.load(join + 1)
    first_part, num_parts = tl.load(join + 2), tl.load(join + 3)
    if num_parts == 0:  # padding
        return
    num_queries, first_token = tl.load(row_lens + row), tl.load(row_starts + row)
    line, dim = tl.program_id(2) * JOINED + tl.arange(0, JOINED), tl.arange(0, DIM_BLOCK)
    query = first_query + line // GROUP
    is_line = (line < LINES // GROUP * GROUP) & (query < num_queries)
    first_at = (first_part.to(tl.int64) * NUM_KV_HEADS + kv_head) * LINES + line
    STRIDE: tl.constexpr = NUM_KV_HEADS * LINES  # from part to part

    piece = tl.arange(0, PIECES)
    is_in = is_line[:, None] & (piece[None, :] < num_parts)
    lse = tl.load(lses + first_at[:, None] + piece[None, :] * STRIDE, mask=is_in, other=-float("inf"))
    best = tl.max(tl.where(is_line[:, None], lse, 0.0), 1)
    beside = tl.zeros((JOINED,), tl.float32)
    if HAS_SINKS:
        sink = load_sinks(sinks + kv_head * GROUP + line % GROUP, is_line)
        best = tl.maximum(best, sink)
        beside = tl.exp2(sink - best)
    total = tl.sum(tl.exp2(lse - best[:, None]), 1) + beside
    acc = tl.zeros((JOINED, DIM_BLOCK), tl.float32)
    for first in range(0, num_parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        at = first_at[:, None] + part[None, :] * STRIDE
        is_part = is_line[:, None] & (part[None, :] < num_parts)
        share = tl.exp2(tl.load(lses + at, mask=is_part, other=-float("inf")) - best[:, None])
        part_at = partials + at[:, :, None] * DIM + dim[None, None, :]
        each = tl.load(part_at, mask=is_part[:, :, None] & (dim[None, None, :] < DIM), other=0.0)
        acc += tl.sum(each * share[:, :, None], 1)
    token = (first_token + query).to(tl.int64)
    to = out + (token * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + line % GROUP) * DIM
    value = (acc / tl.where(is_line, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(to[:, None] + dim[None, :], value, mask=is_line[:, None] & (dim[None, :] < DIM))


_launch_prefill = Launcher(_prefill_kernel)
_launch_join = Launcher(_join_kernel)
