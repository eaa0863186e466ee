"""The choice of a token's experts, as all kernels of experts make it: the largest logits, of equal ones the first."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment


def route(logits: torch.Tensor, *, per_token: int, renormalises: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, numbered from 1, and their weights, the heaviest first.

    float32[T, E] -> int32[T, K], float32[T, K]. NaN is the least logit, and makes weights NaN where it counts.
    """
    num_tokens, num_experts = logits.shape
    experts = torch.empty((num_tokens, per_token), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, per_token), dtype=torch.float32, device=logits.device)
    if num_tokens:
        shape = (num_experts, triton.next_power_of_2(num_experts), per_token, renormalises)
        key = (logits.device.index, *shape, *alignment(logits))
        _launch_route((num_tokens,), logits, experts, weights, *shape, key=key, num_warps=1)
    return experts, weights


@triton.jit
def orderable(logits):
    """Logits without what has no order; minus infinity is below all of them."""
    return tl.maximum(tl.where(logits == logits, logits, -3.0e38), -3.0e38)


@triton.jit
def _route_kernel(
    logits, experts, weights,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, RENORMALISES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    row = tl.load(logits + token * EXPERTS + at, mask=at < EXPERTS, other=-float("inf"))
    left = tl.where(at < EXPERTS, orderable(row), -float("inf"))
    best = tl.argmax(left, 0)
    largest = tl.sum(tl.where(at == best, row, 0.0), 0)
    parts = tl.where(at < EXPERTS, tl.exp(row - largest), 0.0)
    total = tl.sum(parts, 0)
    if RENORMALISES:
        total = tl.sum(tl.zeros((BLOCK,), tl.float32), 0)
        rest = left
        for _ in range(PER_TOKEN):
            chosen = tl.argmax(rest, 0)
            total += tl.sum(tl.where(at == chosen, parts, 0.0), 0)
            rest = tl.where(at == chosen, -float("inf"), rest)
    for place in range(PER_TOKEN):
        chosen = tl.argmax(left, 0)
        part = tl.sum(tl.where(at == chosen, parts, 0.0), 0)
        tl.store(experts + token * PER_TOKEN + place, chosen + 1)
        tl.store(weights + token * PER_TOKEN + place, part / total)
        left = tl.where(at == chosen, -float("inf"), left)


_launch_route = Launcher(_route_kernel)
