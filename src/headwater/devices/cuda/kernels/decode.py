"""Paged attention of single tokens: one Triton kernel per layer, from the raw qkv to the attention's output.

A program computes the query heads of one KV head of one row, over one stretch of its context. This is flash decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The program with the newest token also writes its key and
value. The last program of a row's head to end joins the stretches. The number of a row's stretches depends on its
context, which is read on the device, so a CUDA graph serves every length.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import math
from functools import cache

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.float8 import head_exponent, load_exponents, power_of_two, split_pairs
from headwater.devices.cuda.kernels.join_stretches import join_stretches
from headwater.devices.cuda.kernels.rotary import first_dims, normed, pairing_of, second_dims
from headwater.devices.cuda.kernels.rows import Scales
from headwater.devices.cuda.kernels.sinks import load_sinks, with_sink
from headwater.devices.cuda.paged_batch import PagedBatch
from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory

MAX_SPLITS = 32
_BLOCK = 64  # tokens at a time
_BLOCK_FLOAT8 = 128  # as many bytes
_BLOCK_LARGE_FLOAT32 = 32  # of heads larger than 128: more would not fit in a multiprocessor's memory
_NUM_WARPS = 4
_NUM_STAGES = 2
_MIN_SPLIT = 64  # fewest tokens of a stretch where programs are few
_LONG_SPLIT = 2048  # and where rows alone fill the card: then only long contexts are cut at all
_MAX_LONG_SPLITS = 4  # so that few programs find nothing to do
_PROGRAMS_WANTED = 512  # enough to fill the largest cards, about four to a multiprocessor
_ENOUGH_PROGRAMS = 256  # of whole rows, two to a multiprocessor: as quick as more of shorter stretches
_FEW_PROGRAMS = 264  # up to which programs of twice the warps and tokens at a time are quicker
_FEW_BLOCK, _FEW_WARPS = 128, 8


class DecodeScratch:
    """Partial results of the programs of one row's head, for the program that joins them. Reused by all layers."""

    def __init__(self, *, max_rows: int, geometry: AttentionGeometry, device: torch.device) -> None:
        num_parts = max_rows * geometry.num_heads * MAX_SPLITS
        self.partials = torch.empty((num_parts, geometry.head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(num_parts, dtype=torch.float32, device=device)
        # Zero between kernels: the program that joins sets its counter back.
        self.counters = torch.zeros(max_rows * geometry.num_kv_heads, dtype=torch.int32, device=device)


@cache
def split_limits(num_rows: int, num_kv_heads: int) -> tuple[int, int]:
    """(most stretches a row is cut into, fewest tokens of one) for a step of `num_rows` decodes."""
    wanted = triton.cdiv(_PROGRAMS_WANTED, num_rows * num_kv_heads)
    if num_rows * num_kv_heads < _ENOUGH_PROGRAMS:
        return min(MAX_SPLITS, max(4, triton.next_power_of_2(wanted))), _MIN_SPLIT
    return _MAX_LONG_SPLITS, _LONG_SPLIT


def decode(
    qkv: torch.Tensor,
    out: torch.Tensor,
    geometry: AttentionGeometry,
    batch: PagedBatch,
    *,
    kv: KVMemory,
    layer: int,
    scratch: DecodeScratch,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
    scales: Scales | None = None,
) -> None:
    """Attention of the batch's decodes, the first rows of `qkv` [T, (H + 2G) D], into those of `out` [T, H D].

    `scales`: those by which `qkv` is still to be multiplied.
    """
    num_rows, num_kv_heads, head_dim = batch.num_decodes, geometry.num_kv_heads, geometry.head_dim
    assert num_rows * num_kv_heads <= len(scratch.counters), "scratch memory for fewer heads: no row would be joined"
    group = geometry.num_heads // num_kv_heads
    num_splits, min_split = split_limits(num_rows, num_kv_heads)
    block, num_warps = _block(kv), _NUM_WARPS
    is_few = min_split == _LONG_SPLIT and num_rows * num_kv_heads <= _FEW_PROGRAMS
    if is_few and block == _BLOCK and head_dim <= 128 and qkv.dtype != torch.float32:
        block, num_warps = _FEW_BLOCK, _FEW_WARPS
    angles, window = geometry.layer(layer).rotary, geometry.layer(layer).window
    _decode_kernel[(num_splits, num_kv_heads, num_rows)](
        qkv,
        out,
        kv.pages,
        kv.pages if kv.exponents is None else kv.exponents,
        batch.tables,
        batch.decode_slots,
        batch.positions,
        batch.rotary_rows,
        batch.cos[angles],
        batch.sin[angles],
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        qkv if sinks is None else sinks,
        qkv if scales is None else scales.of_rows,
        qkv if scales is None else scales.of_columns,
        scratch.partials,
        scratch.lse,
        scratch.counters,
        layer * kv.pages.stride(1),
        kv.pages.stride(0),
        batch.tables.stride(0),
        math.log2(math.e) * geometry.scale,
        geometry.norm_eps,
        geometry.norm_offset,
        window or 0,
        num_splits,
        min_split,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        GROUP_JOINED=triton.next_power_of_2(group),
        HALF=head_dim // 2,
        HALF_BLOCK=max(16, triton.next_power_of_2(head_dim // 2)),
        PAGE_SIZE=kv.layout.page_size,
        BLOCK=block,
        MAX_SPLITS=MAX_SPLITS,
        HAS_NORM=q_norm is not None,
        IS_SCALED=kv.exponents is not None,
        PAIRING=pairing_of(geometry),
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        HAS_SCALES=scales is not None,
        num_warps=num_warps,
        num_stages=_NUM_STAGES,
    )


def _block(kv: KVMemory) -> int:
    if kv.exponents is not None:
        return _BLOCK_FLOAT8
    is_large = kv.layout.dtype == "float32" and kv.layout.head_dim > 128
    return _BLOCK_LARGE_FLOAT32 if is_large else _BLOCK


@triton.jit(do_not_specialize=["max_splits", "min_split", "window"])
def _decode_kernel(
    qkv,
    out,
    kv,
    exponents,
    tables,
    slots,
    positions,
    rotary_rows,
    cos_rows,
    sin_rows,
    q_norm,
    k_norm,
    sinks,
    of_rows,
    of_columns,
    partials,
    lses,
    counters,
    layer_offset,
    page_stride,
    table_stride,
    scale,
    eps,
    offset,
    window,
    max_splits,
    min_split,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUP_JOINED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_SCALED: tl.constexpr,
    PAIRING: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    DIM: tl.constexpr = 2 * HALF
    DIM_BLOCK: tl.constexpr = 2 * HALF_BLOCK
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    context = position + 1
    slot = tl.load(slots + row).to(tl.int64)
    rotary = tl.load(rotary_rows + row) * HALF
    lowest = 0  # the first key that is seen, and the block in which it lies
    base = 0
    if HAS_WINDOW:
        lowest = tl.maximum(context - window, 0)
        base = lowest // BLOCK * BLOCK
    num_keys = context - base
    wanted = tl.minimum(max_splits, tl.cdiv(num_keys, min_split))
    # stretches of like length, or the longest would keep the others waiting; none of a padded row
    per_split = tl.cdiv(tl.cdiv(num_keys, tl.maximum(wanted, 1)), BLOCK) * BLOCK
    num_splits = tl.cdiv(num_keys, tl.maximum(per_split, BLOCK))
    if split >= num_splits:  # also every program of a padded row
        return
    table = tables + slot * table_stride
    group, half, dim = tl.arange(0, GROUP_BLOCK), tl.arange(0, HALF_BLOCK), tl.arange(0, DIM_BLOCK)
    cos = tl.load(cos_rows + rotary + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(sin_rows + rotary + half, mask=half < HALF, other=0.0)[None, :]
    tokens = qkv + row.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * DIM)

    first_dim, second_dim = first_dims(half, HALF, PAIRING), second_dims(half, HALF, PAIRING)
    q_at = tokens + (kv_head * GROUP + group[:, None]) * DIM
    is_q = (group[:, None] < GROUP) & (half[None, :] < HALF)
    q1 = tl.load(q_at + first_dim[None, :], mask=is_q, other=0.0).to(tl.float32)
    q2 = tl.load(q_at + second_dim[None, :], mask=is_q, other=0.0).to(tl.float32)
    if HAS_SCALES:
        of_row = tl.load(of_rows + row)
        of_q = of_columns + (kv_head * GROUP + group[:, None]) * DIM
        q1 *= of_row * tl.load(of_q + first_dim[None, :], mask=is_q, other=0.0)
        q2 *= of_row * tl.load(of_q + second_dim[None, :], mask=is_q, other=0.0)
    if HAS_NORM:
        q1, q2 = normed(q1, q2, q_norm, half, HALF, PAIRING, eps, offset)
    dtype: tl.constexpr = qkv.dtype.element_ty
    r1, r2 = (q1 * cos - q2 * sin).to(dtype), (q2 * cos + q1 * sin).to(dtype)
    # 8-bit floats are widened to float16 in one instruction, and their products lose nothing in it
    product: tl.constexpr = tl.float16 if IS_SCALED and dtype == tl.bfloat16 else dtype
    r1, r2 = r1.to(product), r2.to(product)

    pages = kv + layer_offset + kv_head * PAGE_SIZE * DIM  # of this head's keys; its values follow
    VALUES: tl.constexpr = NUM_KV_HEADS * PAGE_SIZE * DIM
    exponents += layer_offset + kv_head * PAGE_SIZE  # likewise
    if split == num_splits - 1:
        one = tl.arange(0, 1)
        k_at = tokens + (NUM_HEADS + kv_head) * DIM + one[:, None]
        k1 = tl.load(k_at + first_dim[None, :], mask=half[None, :] < HALF, other=0.0).to(tl.float32)
        k2 = tl.load(k_at + second_dim[None, :], mask=half[None, :] < HALF, other=0.0).to(tl.float32)
        if HAS_SCALES:
            of_k = of_columns + (NUM_HEADS + kv_head) * DIM + one[:, None]
            k1 *= of_row * tl.load(of_k + first_dim[None, :], mask=half[None, :] < HALF, other=0.0)
            k2 *= of_row * tl.load(of_k + second_dim[None, :], mask=half[None, :] < HALF, other=0.0)
        if HAS_NORM:
            k1, k2 = normed(k1, k2, k_norm, half, HALF, PAIRING, eps, offset)
        v = tl.load(tokens + (NUM_HEADS + NUM_KV_HEADS + kv_head) * DIM + dim, mask=dim < DIM, other=0.0)
        if HAS_SCALES:
            of_v = of_columns + (NUM_HEADS + NUM_KV_HEADS + kv_head) * DIM + dim
            v = (v.to(tl.float32) * (of_row * tl.load(of_v, mask=dim < DIM, other=0.0))).to(dtype)
        page = tl.load(table + position // PAGE_SIZE).to(tl.int64)
        to = pages + page * page_stride + (position % PAGE_SIZE) * DIM
        y1, y2 = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
        if IS_SCALED:
            y1, y2, v = y1.to(tl.float32), y2.to(tl.float32), v.to(tl.float32)
            of_key = head_exponent(tl.max(tl.max(tl.maximum(tl.abs(y1), tl.abs(y2)), 1), 0))
            of_value = head_exponent(tl.max(tl.abs(v), 0))
            y1, y2, v = y1 * power_of_two(-of_key), y2 * power_of_two(-of_key), v * power_of_two(-of_value)
            exponent_to = exponents + page * page_stride + position % PAGE_SIZE
            tl.store(exponent_to, of_key.to(tl.int8))
            tl.store(exponent_to + NUM_KV_HEADS * PAGE_SIZE, of_value.to(tl.int8))
        stored: tl.constexpr = kv.dtype.element_ty
        tl.store(to + one[:, None] + half[None, :], y1.to(stored), mask=half[None, :] < HALF)
        tl.store(to + HALF + one[:, None] + half[None, :], y2.to(stored), mask=half[None, :] < HALF)
        tl.store(to + VALUES + dim, v.to(stored), mask=dim < DIM)
        tl.debug_barrier()  # the loop below reads them

    start = base + split * per_split
    stop = tl.minimum(start + per_split, context)
    best = tl.full((GROUP_BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    acc = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    if IS_SCALED:
        even, odd = tl.zeros((GROUP_BLOCK, HALF_BLOCK), tl.float32), tl.zeros((GROUP_BLOCK, HALF_BLOCK), tl.float32)
        # read a block ahead by hand: Triton's pipeline leaves out loads of single bytes
        first_keys = start + tl.arange(0, BLOCK)
        next_of_keys, next_of_values = load_exponents(
            exponents, table, page_stride, first_keys, first_keys < stop, PAGE_SIZE, NUM_KV_HEADS * PAGE_SIZE
        )
    for first in range(start, stop, BLOCK):
        keys = first + tl.arange(0, BLOCK)
        is_key = keys < stop  # beyond lies whatever the page held before, NaN even
        if HAS_WINDOW:
            is_key = is_key & (keys >= lowest)
        page = tl.load(table + keys // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        line = pages + page * page_stride + (keys % PAGE_SIZE) * DIM
        k_at = line[:, None] + half[None, :]
        is_half = is_key[:, None] & (half[None, :] < HALF)
        k1 = tl.load(k_at, mask=is_half, other=0.0).to(product)
        k2 = tl.load(k_at + HALF, mask=is_half, other=0.0).to(product)
        scores = tl.dot(r1, tl.trans(k1), input_precision="tf32x3")
        scores = tl.dot(r2, tl.trans(k2), scores, input_precision="tf32x3") * scale
        if IS_SCALED:
            of_keys, of_values = next_of_keys, next_of_values
            next_of_keys, next_of_values = load_exponents(
                exponents, table, page_stride, keys + BLOCK, keys + BLOCK < stop, PAGE_SIZE, NUM_KV_HEADS * PAGE_SIZE
            )
            # the value's power of two goes into its weight, as a logarithm, so that weights stay within [0, 1]
            scores = scores * power_of_two(of_keys)[None, :] + of_values.to(tl.float32)[None, :]
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        larger = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - larger)
        weights = tl.exp2(scores - larger[:, None])
        if IS_SCALED:
            total = total * shrink + tl.sum(weights * power_of_two(-of_values.to(tl.int32))[None, :], 1)
            # two neighbours at a time: tensor cores want keys side by side, which single bytes are slow to become
            pair_at = (line + VALUES).to(tl.pointer_type(tl.int16))[:, None] + half[None, :]
            v1, v2 = split_pairs(tl.load(pair_at, mask=is_half, other=0), kv.dtype.element_ty, product)
            even = tl.dot(weights.to(product), v1, even * shrink[:, None], input_precision="tf32x3")
            odd = tl.dot(weights.to(product), v2, odd * shrink[:, None], input_precision="tf32x3")
        else:
            total = total * shrink + tl.sum(weights, 1)
            v_at = line[:, None] + VALUES + dim[None, :]
            v = tl.load(v_at, mask=is_key[:, None] & (dim[None, :] < DIM), other=0.0)
            acc = tl.dot(weights.to(product), v, acc * shrink[:, None], input_precision="tf32x3")
        best = larger
    if IS_SCALED:
        acc = tl.reshape(tl.join(even, odd), (GROUP_BLOCK, DIM_BLOCK))

    if HAS_SINKS:  # noqa: SIM102  decided when it is compiled
        if num_splits == 1:
            sink = load_sinks(sinks + kv_head * GROUP + group, group < GROUP)
            acc, total = with_sink(acc, best, total, sink)
    result = acc / total[:, None]
    head = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP
    is_out = (group[:, None] < GROUP) & (dim[None, :] < DIM)
    if num_splits == 1:
        tl.store(out + (head + group[:, None]) * DIM + dim[None, :], result.to(dtype), mask=is_out)
        return
    part = (head * MAX_SPLITS) + split * GROUP + group
    tl.store(partials + part[:, None] * DIM + dim[None, :], result, mask=is_out)
    tl.store(lses + part, best + tl.log2(total), mask=group < GROUP)
    tl.debug_barrier()  # all of the program's stores before its count
    counter = counters + row * NUM_KV_HEADS + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1:
        tl.debug_barrier()
        tl.store(counter, 0)
        join_stretches(
            partials, lses, sinks, out, head, kv_head, num_splits,
            GROUP=GROUP, GROUP_JOINED=GROUP_JOINED, DIM=DIM, DIM_BLOCK=DIM_BLOCK, MAX_SPLITS=MAX_SPLITS,
            HAS_SINKS=HAS_SINKS,
        )  # fmt: skip
