"""Rows in the order of their experts, for a library's grouped products: of many rows of each expert.

A library's product takes the rows of an expert side by side. The router numbers each expert's rows (route.Counts), so
one kernel puts them in order. The sum by weight reads a token's results wherever they lie.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.experts.route import Counts
from headwater.devices.cuda.kernels.launch import Launcher, alignment

_MIN_ROWS = 240  # of an expert in the mean, from which the library's products make up for putting rows in order
_UNIT = 8  # the library's sizes must be multiples of it
_COPY_BLOCK = 2048


@dataclass(frozen=True, slots=True, eq=False)
class OrderedRows:
    """Each token's row once for each of its experts: rows [T * K, in], those of an expert side by side.

    `places`: where row K t + k of the tokens lies, int32[T * K]. `ends`: of the experts' rows, int32[E].
    """

    rows: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor


def suits_ordered(num_rows: int, num_experts: int, *, width: int, inner: int, like: torch.Tensor) -> bool:
    """Whether a library's products are the faster way for `num_rows` rows, counted once for each of their experts."""
    if like.dtype != torch.bfloat16 or width % _UNIT or inner % _UNIT or num_rows < _MIN_ROWS * num_experts:
        return False
    return has_grouped_products(like.device)


def has_grouped_products(device: torch.device) -> bool:
    """Whether the library has them for the device: Hopper or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def order_rows(x: torch.Tensor, experts: torch.Tensor, counts: Counts) -> OrderedRows:
    """x [T, in], experts int32[T, K] numbered from 1, and what `route` counted."""
    (num_tokens, width), per_token = x.shape, experts.shape[1]
    num_experts = len(counts.of_expert)
    rows = torch.empty((num_tokens * per_token, width), dtype=x.dtype, device=x.device)
    places = torch.empty(num_tokens * per_token, dtype=torch.int32, device=x.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    block = min(_COPY_BLOCK, triton.next_power_of_2(width))
    flags = (width, num_experts, triton.next_power_of_2(num_experts), per_token, block)
    key = (x.device.index, x.dtype, *flags, *alignment(x, experts))
    _launch_order(
        (num_tokens, triton.cdiv(width, block)),
        x, experts, counts.of_expert, counts.within, rows, places, ends, *flags, key=key,
    )  # fmt: skip
    return OrderedRows(rows, places, ends)


def grouped_product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows in order times the matrices of their experts, [E, out, in] -> [rows, out]"""
    return torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)


@triton.jit
def _order_kernel(
    x, experts, of_expert, within, rows, places, ends,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, EXPERT_BLOCK)
    counts = tl.load(of_expert + at, mask=at < EXPERTS, other=0)
    stops = tl.cumsum(counts, 0)
    starts = stops - counts
    is_first = tl.program_id(1) == 0
    if is_first & (token == 0):
        tl.store(ends + at, stops, mask=at < EXPERTS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < WIDTH
    value = tl.load(x + token * WIDTH + column, mask=is_in, other=0.0)
    for place in tl.static_range(PER_TOKEN):
        row = token * PER_TOKEN + place
        expert = tl.load(experts + row) - 1
        to = tl.sum(tl.where(at == expert, starts, 0), 0) + tl.load(within + row)
        if is_first:
            tl.store(places + row, to)
        tl.store(rows + to.to(tl.int64) * WIDTH + column, value, mask=is_in)


_launch_order = Launcher(_order_kernel)
