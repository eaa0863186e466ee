"""The activation of experts, between their two products."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from headwater.devices.cuda.kernels.layers import activated


@triton.jit
def gated(gate, up, IS_CLAMPED: tl.constexpr):
    """silu(gate) * up, or "clamped_swiglu" of device.py. NaN stays NaN."""
    if IS_CLAMPED:
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        return gate / (1.0 + tl.exp(-1.702 * gate)) * up
    return activated(gate, False) * up
