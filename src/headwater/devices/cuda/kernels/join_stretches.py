"""The end of decode attention: a row's stretches of context become the output of the queries of a KV head."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from headwater.devices.cuda.kernels.sinks import load_sinks

_MANY_QUERIES = tl.constexpr(8)  # of a KV head, from which they are joined together
_AT_ONCE = tl.constexpr(8)  # stretches, then


@triton.jit
def join_stretches(
    partials, lses, sinks, out, head, kv_head, num_splits,
    GROUP: tl.constexpr, GROUP_JOINED: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """`head`: the first of the KV head's GROUP query heads, counted over all rows."""
    if GROUP >= _MANY_QUERIES:
        _join_together(
            partials, lses, sinks, out, head, kv_head, num_splits,
            GROUP, GROUP_JOINED, DIM, DIM_BLOCK, MAX_SPLITS, HAS_SINKS,
        )  # fmt: skip
    else:
        _join_each(
            partials, lses, sinks, out, head, kv_head, num_splits, GROUP, DIM, DIM_BLOCK, MAX_SPLITS, HAS_SINKS
        )


@triton.jit
def _join_each(
    partials, lses, sinks, out, head, kv_head, num_splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, MAX_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Of one query after the other, all stretches at once."""
    splits, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, DIM_BLOCK)
    is_split = splits < num_splits
    for member in tl.static_range(GROUP):
        parts = head * MAX_SPLITS + splits * GROUP + member
        # .cg: past the first-level cache, which the other programs' stores did not go through
        lse = tl.load(lses + parts, mask=is_split, other=-float("inf"), cache_modifier=".cg")
        most = tl.max(lse, 0)
        beside = 0.0
        if HAS_SINKS:
            sink = load_sinks(sinks + kv_head * GROUP + member, True)
            most = tl.maximum(most, sink)
            beside = tl.exp2(sink - most)
        share = tl.exp2(lse - most)
        is_part = is_split[:, None] & (dim[None, :] < DIM)
        part_at = partials + parts[:, None] * DIM + dim[None, :]
        each = tl.load(part_at, mask=is_part, other=0.0, cache_modifier=".cg")
        joined = tl.sum(each * share[:, None], 0) / (tl.sum(share, 0) + beside)
        tl.store(out + (head + member) * DIM + dim, joined.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit
def _join_together(
    partials, lses, sinks, out, head, kv_head, num_splits,
    GROUP: tl.constexpr, GROUP_JOINED: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Of all queries at once: of many, one after the other, the loads would wait for each other."""
    member, splits, dim = tl.arange(0, GROUP_JOINED), tl.arange(0, MAX_SPLITS), tl.arange(0, DIM_BLOCK)
    is_member = member < GROUP
    first_part = head * MAX_SPLITS + member
    # .cg: past the first-level cache, which the other programs' stores did not go through
    is_split = is_member[:, None] & (splits < num_splits)[None, :]
    lse_at = lses + first_part[:, None] + (splits * GROUP)[None, :]
    lse = tl.load(lse_at, mask=is_split, other=-float("inf"), cache_modifier=".cg")
    most = tl.where(is_member, tl.max(lse, 1), 0.0)
    beside = tl.zeros((GROUP_JOINED,), tl.float32)
    if HAS_SINKS:
        sink = load_sinks(sinks + kv_head * GROUP + member, is_member)
        most = tl.maximum(most, sink)
        beside = tl.exp2(sink - most)
    total = tl.where(is_member, tl.sum(tl.exp2(lse - most[:, None]), 1) + beside, 1.0)
    acc = tl.zeros((GROUP_JOINED, DIM_BLOCK), tl.float32)
    for first in range(0, num_splits, _AT_ONCE):
        for following in tl.static_range(_AT_ONCE):
            split = tl.full((GROUP_JOINED,), first + following, tl.int32)
            is_part = is_member & (split < num_splits)
            part = first_part + split * GROUP
            its_lse = tl.load(lses + part, mask=is_part, other=-float("inf"), cache_modifier=".cg")
            part_at = partials + part[:, None] * DIM + dim[None, :]
            each = tl.load(part_at, mask=is_part[:, None] & (dim < DIM)[None, :], other=0.0, cache_modifier=".cg")
            acc += each * tl.exp2(its_lse - most)[:, None]
    is_out = is_member[:, None] & (dim < DIM)[None, :]
    out_at = out + (head + member)[:, None] * DIM + dim[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_out)
