"""The choice of a token's experts, as all kernels of experts make it: the largest logits, of equal ones the first."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """How many rows each expert has, int32[E], and the number of each row among its expert's, int32[T, K].

    Programs count in any order, so numbers differ from run to run.
    """

    of_expert: torch.Tensor
    within: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, num_experts: int, *, per_token: int, device: torch.device) -> "Counts":
        of_expert = torch.zeros(num_experts, dtype=torch.int32, device=device)
        return cls(of_expert, torch.empty((num_tokens, per_token), dtype=torch.int32, device=device))


def route(
    logits: torch.Tensor,
    *,
    per_token: int,
    renormalises: bool,
    counts: Counts | None = None,
    clears: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, numbered from 1, and their weights, the heaviest first.

    float32[T, E] -> int32[T, K], float32[T, K]. NaN is the least logit, and makes weights NaN where it counts. `counts`
    that are empty are filled. `clears`: memory of integers that is set to 0, for a later kernel.
    """
    num_tokens, num_experts = logits.shape
    experts = torch.empty((num_tokens, per_token), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, per_token), dtype=torch.float32, device=logits.device)
    if num_tokens:
        blocks = triton.next_power_of_2(num_experts), triton.next_power_of_2(per_token)
        shape = (num_experts, blocks[0], per_token, blocks[1], renormalises, counts is not None)
        shape = (*shape, 0 if clears is None else len(clears))
        of_expert, within = (experts, experts) if counts is None else (counts.of_expert, counts.within)
        clears = experts if clears is None else clears
        key = (logits.device.index, *shape, *alignment(logits, clears))
        _launch_route((num_tokens,), logits, experts, weights, of_expert, within, clears, *shape, key=key, num_warps=1)
    return experts, weights


@triton.jit
def orderable(logits):
    """Logits without what has no order; minus infinity is below all of them."""
    return tl.maximum(tl.where(logits == logits, logits, -3.0e38), -3.0e38)


@triton.jit
def _route_kernel(
    logits, experts, weights, of_expert, within, clears,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, PLACES: tl.constexpr,
    RENORMALISES: tl.constexpr, COUNTS: tl.constexpr, CLEARS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if CLEARS > 0:  # noqa: SIM102  decided when it is compiled
        if token == 0:
            for first in range(0, CLEARS, BLOCK):
                tl.store(clears + first + at, tl.zeros((BLOCK,), tl.int32), mask=first + at < CLEARS)
    row = tl.load(logits + token * EXPERTS + at, mask=at < EXPERTS, other=-float("inf"))
    left = tl.where(at < EXPERTS, orderable(row), -float("inf"))
    best = tl.argmax(left, 0)
    largest = tl.sum(tl.where(at == best, row, 0.0), 0)
    parts = tl.where(at < EXPERTS, tl.exp(row - largest), 0.0)
    places = tl.arange(0, PLACES)
    all_chosen = tl.zeros((PLACES,), tl.int32)
    all_parts = tl.zeros((PLACES,), tl.float32)
    total = tl.sum(tl.zeros((BLOCK,), tl.float32), 0)
    for place in range(PER_TOKEN):
        chosen = tl.argmax(left, 0)
        part = tl.sum(tl.where(at == chosen, parts, 0.0), 0)
        total += part
        all_chosen = tl.where(places == place, chosen, all_chosen)
        all_parts = tl.where(places == place, part, all_parts)
        left = tl.where(at == chosen, -float("inf"), left)
    if not RENORMALISES:
        total = tl.sum(parts, 0)
    to, is_place = token * PER_TOKEN + places, places < PER_TOKEN
    tl.store(experts + to, all_chosen + 1, mask=is_place)
    tl.store(weights + to, all_parts / total, mask=is_place)
    if COUNTS:
        tl.store(within + to, tl.atomic_add(of_expert + all_chosen, 1, mask=is_place, sem="relaxed"), mask=is_place)


_launch_route = Launcher(_route_kernel)
