"""RMSNorm and the gate of the MLP as Triton kernels: one pass over the data each."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment


def rms_norm(residual: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: float = 1.0) -> torch.Tensor:
    """float32[T, features] -> [T, features] in `weight`'s dtype, multiplied by `scale` (arXiv 1910.07467)."""
    num_tokens, width = residual.shape
    y = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    if num_tokens:
        block = triton.next_power_of_2(width)
        num_warps = max(1, min(16, block // 512))
        key = (weight.device.index, weight.dtype, width, *alignment(residual, weight))
        _launch_rms_norm((num_tokens,), residual, weight, y, width, eps, scale, block, key=key, num_warps=num_warps)
    return y


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [gate, up]. [T, 2 n] -> [T, n]"""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        block = 1024
        grid = (triton.cdiv(width, block), num_tokens)
        key = (gate_up.device.index, gate_up.dtype, width, *alignment(gate_up))
        _launch_silu_mul(grid, gate_up, y, width, block, key=key)
    return y


@triton.jit
def _rms_norm_kernel(x, weight, y, width, eps, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    is_in = at < width
    value = tl.load(x + row + at, mask=is_in, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    by = tl.load(weight + at, mask=is_in, other=0.0).to(tl.float32) * factor
    tl.store(y + row + at, (value * scale * by).to(y.dtype.element_ty), mask=is_in)


@triton.jit
def _silu_mul_kernel(gate_up, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=is_in, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=is_in)


_launch_rms_norm = Launcher(_rms_norm_kernel)
_launch_silu_mul = Launcher(_silu_mul_kernel)
