"""Copies keys and values out of their pages, for kernels that know no pages."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.float8 import power_of_two
from headwater.devices.cuda.paged_batch import Contexts
from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory

_BLOCK = 64  # tokens of a program


def gather(
    contexts: Contexts,
    tables: torch.Tensor,
    geometry: AttentionGeometry,
    *,
    kv: KVMemory,
    layer: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One layer's keys and values of whole contexts, as `dtype`. [tokens of the contexts, 2 (K, V), G, D]"""
    num_kv_heads, head_dim = geometry.num_kv_heads, geometry.head_dim
    out = torch.empty((contexts.num_tokens, 2, num_kv_heads, head_dim), dtype=dtype, device=tables.device)
    _gather_kernel[(triton.cdiv(contexts.longest, _BLOCK), len(contexts.slots), 2 * num_kv_heads)](
        out,
        kv.pages,
        kv.pages if kv.exponents is None else kv.exponents,
        tables,
        contexts.slots,
        contexts.starts,
        layer * kv.pages.stride(1),
        kv.pages.stride(0),
        tables.stride(0),
        NUM_HEADS=2 * num_kv_heads,
        DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        PAGE_SIZE=kv.layout.page_size,
        BLOCK=_BLOCK,
        IS_SCALED=kv.exponents is not None,
    )
    return out


@triton.jit
def _gather_kernel(
    out,
    kv,
    exponents,
    tables,
    slots,
    starts,
    layer_offset,
    page_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    row, head = tl.program_id(1), tl.program_id(2)  # the values' heads follow the keys'
    start = tl.load(starts + row)
    context = tl.load(starts + row + 1) - start
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token, dim = tokens < context, tl.arange(0, DIM_BLOCK)
    table = tables + tl.load(slots + row).to(tl.int64) * table_stride
    page = tl.load(table + tokens // PAGE_SIZE, mask=is_token, other=0).to(tl.int64)
    line = page * page_stride + layer_offset
    within = head * PAGE_SIZE + tokens % PAGE_SIZE
    is_in = is_token[:, None] & (dim[None, :] < DIM)
    x = tl.load(kv + (line + within * DIM)[:, None] + dim[None, :], mask=is_in, other=0.0)
    if IS_SCALED:
        exponent = tl.load(exponents + line + within, mask=is_token, other=0)
        x = x.to(tl.float32) * power_of_two(exponent)[:, None]
    to = ((start + tokens).to(tl.int64) * NUM_HEADS + head) * DIM
    tl.store(out + to[:, None] + dim[None, :], x.to(out.dtype.element_ty), mask=is_in)
