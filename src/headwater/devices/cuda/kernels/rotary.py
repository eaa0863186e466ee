"""QK-norm and rotary embedding inside Triton kernels, and the kernel that writes a prompt's keys and values.

A head is handled as two halves of head_dim / 2 numbers, which the rotation pairs (arXiv 2104.09864).
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.float8 import head_exponent, power_of_two
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.paged_batch import PagedBatch
from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory

_HEADS_PER_PROGRAM = 8


def write_prompt_kv(
    qkv: torch.Tensor,
    geometry: AttentionGeometry,
    batch: PagedBatch,
    *,
    kv: KVMemory,
    layer: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    """Norm and rotate the queries of the batch's prompt tokens in place; write their keys and values to the pages.

    `qkv` is [T, (H + 2G) D]; rows before `batch.num_decodes` are left alone. With external chunks, keys are
    rotated in place as well.
    """
    chunks = batch.chunks
    assert chunks is not None
    half, table_stride = geometry.head_dim // 2, batch.tables.stride(0)
    page_stride, layer_offset = kv.pages.stride(0), layer * kv.pages.stride(1)
    exponents = kv.pages if kv.exponents is None else kv.exponents
    tokens = qkv[batch.num_decodes :]
    angles = geometry.layer(layer).rotary
    grid = (len(chunks.token_slots), triton.cdiv(geometry.num_heads + 2 * geometry.num_kv_heads, _HEADS_PER_PROGRAM))
    pairing = pairing_of(geometry)
    sizes = (geometry.num_heads, geometry.num_kv_heads, half, kv.layout.page_size, q_norm is not None, pairing)
    aligned = alignment(tokens, exponents, layer_offset, page_stride, table_stride)
    _launch_write(
        grid,
        tokens,
        kv.pages,
        exponents,
        batch.tables,
        chunks.token_slots,
        chunks.positions,
        chunks.rotary_rows,
        batch.cos[angles],
        batch.sin[angles],
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        layer_offset,
        page_stride,
        table_stride,
        geometry.norm_eps,
        geometry.norm_offset,
        geometry.num_heads,
        geometry.num_kv_heads,
        half,
        triton.next_power_of_2(half),
        kv.layout.page_size,
        _HEADS_PER_PROGRAM,
        q_norm is not None,
        kv.exponents is not None,
        chunks.external is not None,
        pairing,
        key=(
            qkv.device.index,
            qkv.dtype,
            kv.layout.dtype,
            sizes,
            aligned,
            table_stride == 1,
            chunks.external is not None,
        ),
    )


def pairing_of(geometry: AttentionGeometry) -> int:
    """How the kernels find the dims of rotary pairs: 0 for neighbours, else the number of pairs that are rotated."""
    if geometry.is_interleaved:
        return 0
    return geometry.head_dim // 2 if geometry.rotary_pairs is None else geometry.rotary_pairs


@triton.jit
def first_dims(pair, HALF: tl.constexpr, PAIRING: tl.constexpr):
    """The first dim of each pair (AttentionGeometry.pair_order)."""
    if PAIRING == 0:
        return 2 * pair
    elif PAIRING == HALF:
        return pair
    else:
        return tl.where(pair < PAIRING, pair, pair + PAIRING)


@triton.jit
def second_dims(pair, HALF: tl.constexpr, PAIRING: tl.constexpr):
    """The second dim of each pair."""
    if PAIRING == 0:
        return 2 * pair + 1
    elif PAIRING == HALF:
        return HALF + pair
    else:
        return tl.where(pair < PAIRING, pair + PAIRING, pair + HALF)


@triton.jit
def normed(x1, x2, weight, half, HALF: tl.constexpr, PAIRING: tl.constexpr, eps, offset):
    """RMSNorm of heads given as the dims of pairs, float32[heads, HALF_BLOCK] each; `weight` is [2 HALF].

    Rounded to the weight's dtype, as the models were trained.
    """
    is_in = half < HALF
    w1 = tl.load(weight + first_dims(half, HALF, PAIRING), mask=is_in, other=0.0)
    w2 = tl.load(weight + second_dims(half, HALF, PAIRING), mask=is_in, other=0.0)
    scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
    y1 = (x1 * scale * (w1[None, :].to(tl.float32) + offset)).to(w1.dtype).to(tl.float32)
    y2 = (x2 * scale * (w2[None, :].to(tl.float32) + offset)).to(w2.dtype).to(tl.float32)
    return y1, y2


@triton.jit
def _write_kernel(
    qkv,
    kv,
    exponents,
    tables,
    token_slots,
    positions,
    rotary_rows,
    cos_rows,
    sin_rows,
    q_norm,
    k_norm,
    layer_offset,
    page_stride,
    table_stride,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_SCALED: tl.constexpr,
    KEEPS_KEYS: tl.constexpr,
    PAIRING: tl.constexpr,
):
    token = tl.program_id(0)
    position = tl.load(positions + token)
    if position < 0:  # padding
        return
    ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, HALF_BLOCK)
    is_in = (heads[:, None] < ALL) & (half[None, :] < HALF)
    at = qkv + token.to(tl.int64) * (ALL * 2 * HALF) + heads[:, None] * (2 * HALF) + half[None, :]
    raw1 = tl.load(at, mask=is_in, other=0.0)
    raw2 = tl.load(at + HALF, mask=is_in, other=0.0)
    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    if PAIRING != HALF:
        token_heads = qkv + token.to(tl.int64) * (ALL * 2 * HALF) + heads[:, None] * (2 * HALF)
        x1 = tl.load(token_heads + first_dims(half, HALF, PAIRING)[None, :], mask=is_in, other=0.0).to(tl.float32)
        x2 = tl.load(token_heads + second_dims(half, HALF, PAIRING)[None, :], mask=is_in, other=0.0).to(tl.float32)
        tl.debug_barrier()  # what is read here is written by other threads below
    is_query = heads[:, None] < NUM_HEADS
    if HAS_NORM:
        q1, q2 = normed(x1, x2, q_norm, half, HALF, PAIRING, eps, offset)
        k1, k2 = normed(x1, x2, k_norm, half, HALF, PAIRING, eps, offset)
        x1, x2 = tl.where(is_query, q1, k1), tl.where(is_query, q2, k2)
    rotary = tl.load(rotary_rows + token) * HALF
    cos = tl.load(cos_rows + rotary + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(sin_rows + rotary + half, mask=half < HALF, other=0.0)[None, :]
    is_value = heads[:, None] >= NUM_HEADS + NUM_KV_HEADS
    y1 = tl.where(is_value, raw1, (x1 * cos - x2 * sin).to(raw1.dtype))
    y2 = tl.where(is_value, raw2, (x2 * cos + x1 * sin).to(raw2.dtype))
    is_kept = is_query
    if KEEPS_KEYS:
        is_kept = heads[:, None] < NUM_HEADS + NUM_KV_HEADS
    tl.store(at, y1, mask=is_in & is_kept)
    tl.store(at + HALF, y2, mask=is_in & is_kept)
    slot = tl.load(token_slots + token).to(tl.int64)
    page = tl.load(tables + slot * table_stride + position // PAGE_SIZE).to(tl.int64)
    # The keys' heads are followed by the values' in qkv and in a page alike.
    lines = (heads - NUM_HEADS) * PAGE_SIZE + position % PAGE_SIZE
    to = kv + page * page_stride + layer_offset + lines[:, None] * (2 * HALF) + half[None, :]
    if IS_SCALED:
        y1, y2 = y1.to(tl.float32), y2.to(tl.float32)
        exponent = head_exponent(tl.max(tl.maximum(tl.abs(y1), tl.abs(y2)), 1))
        y1, y2 = y1 * power_of_two(-exponent)[:, None], y2 * power_of_two(-exponent)[:, None]
        exponent_to = exponents + page * page_stride + layer_offset + lines
        tl.store(exponent_to, exponent.to(tl.int8), mask=(heads >= NUM_HEADS) & (heads < ALL))
    stored: tl.constexpr = kv.dtype.element_ty
    tl.store(to, y1.to(stored), mask=is_in & (is_query == 0))
    tl.store(to + HALF, y2.to(stored), mask=is_in & (is_query == 0))


_launch_write = Launcher(_write_kernel)
