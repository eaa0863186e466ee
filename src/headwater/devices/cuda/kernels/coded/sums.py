"""Sums that products over codes need: of splits of their inputs, and of the inputs of each group."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.rows import Parts

_SUM_BLOCK = 1024


def add_sums(parts: Parts, y: torch.Tensor, *, adds: bool) -> None:
    """y = parts that have no weights, or y += them. [T, out], whose rows may be parts of longer ones."""
    sums, bias, scales = parts.rows, parts.bias, parts.scales
    num_splits, num_tokens, num_features = sums.shape
    sizes = (num_features, y.stride(0))
    flags = (num_splits, bias is not None, scales is not None, adds, _SUM_BLOCK)
    of_rows, of_columns = (sums, sums) if scales is None else (scales.of_rows, scales.of_columns)
    pointers = (sums, sums if bias is None else bias, of_rows, of_columns, y)
    key = (y.device.index, *(each.dtype for each in pointers), *sizes, *flags, *alignment(*pointers))
    grid = (num_tokens, triton.cdiv(num_features, _SUM_BLOCK))
    _launch_sums(grid, *pointers, num_tokens, *sizes, *flags, key=key)


def group_sums(x: torch.Tensor, group: int) -> torch.Tensor:
    """The sum of each group of inputs: [T, in] -> float32[T, in / group]"""
    num_tokens, width = x.shape
    num_groups = triton.cdiv(width, group)
    sums = torch.empty((num_tokens, num_groups), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(group)
    groups = max(1, min(triton.next_power_of_2(num_groups), _SUM_BLOCK * 4 // block))
    flags = (group, groups, block)
    key = (x.device.index, x.dtype, width, num_groups, *flags, *alignment(x, sums))
    _launch_group_sums((num_tokens, triton.cdiv(num_groups, groups)), x, sums, width, num_groups, *flags, key=key)
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def _add_splits_kernel(
    sums, biases, of_rows, of_columns, y, num_tokens, num_features, y_stride,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    is_in = at < num_features
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (split * num_tokens + token) * num_features + at, mask=is_in, other=0.0)
    if HAS_SCALES:
        total *= tl.load(of_rows + token) * tl.load(of_columns + at, mask=is_in, other=0.0)
    if HAS_BIAS:
        total += tl.load(biases + at, mask=is_in, other=0.0).to(tl.float32)
    y_at = y + token * y_stride + at
    if ADDS:
        total += tl.load(y_at, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=is_in)


@triton.jit
def _group_sums_kernel(
    x, sums, width, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    is_group = group < num_groups
    place = group[:, None] * GROUP + column[None, :]
    is_in = (place < width) & (column < GROUP)[None, :]
    value = tl.load(x + token * width + place, mask=is_in, other=0.0).to(tl.float32)
    tl.store(sums + token * num_groups + group, tl.sum(value, 1), mask=is_group)


_launch_group_sums = Launcher(_group_sums_kernel)
_launch_sums = Launcher(_add_splits_kernel)
