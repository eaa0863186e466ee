"""Write single integers on the device: the changed entries of page tables."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

_BLOCK = 256


def write_entries(target: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
    """target[at[i]] = values[i] for all i, of a contiguous `target`; all int32, no index twice."""
    _write_entries_kernel[(triton.cdiv(len(at), _BLOCK),)](target, at, values, len(at), BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["count"])
def _write_entries_kernel(target, at, values, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_in = index < count
    where = tl.load(at + index, mask=is_in, other=0)
    tl.store(target + where, tl.load(values + index, mask=is_in, other=0), mask=is_in)
