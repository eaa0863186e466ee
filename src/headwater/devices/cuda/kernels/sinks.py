"""Attention sinks: a score of each head beside those of the keys, which has no value. For the kernels of attention."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def load_sinks(at, mask):
    """Sinks as powers of two, as the kernels keep scores."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def with_sink(acc, best, total, sink):
    """Sums of values [N, D] and of weights [N], relative to 2^best, with the sink's weight among the latter."""
    most = tl.maximum(best, sink)
    keep = tl.exp2(best - most)
    return acc * keep[:, None], total * keep + tl.exp2(sink - most)
