"""A layer of experts in numpy: the definition that kernels/linear/experts.c and the GPU's kernels compute.

Shape letters: T tokens, E experts, K experts of a token.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.plain.linear import Floats, gated, linear
from headwater.devices.device import Activation

Ints = npt.NDArray[np.int32]


def route(logits: Floats, per_token: int, *, renormalises: bool) -> tuple[Ints, Floats]:
    """The experts of each token, the most probable first and of equal ones the lower number, and their weights.

    float32[T, E] -> int32[T, K], float32[T, K]. NaN is the least logit, and makes the weights of its token NaN where it
    counts.
    """
    order = np.where(np.isnan(logits), -np.inf, logits)
    experts = np.argsort(-order, axis=1, kind="stable")[:, :per_token].astype(np.int32)
    chosen = np.take_along_axis(logits, experts.astype(np.int64), axis=1)
    largest = chosen[:, :1]
    with np.errstate(invalid="ignore"):
        weights = np.exp(chosen - largest)
        total = (weights if renormalises else np.exp(logits - largest)).sum(axis=1, keepdims=True)
        return experts, (weights / total).astype(np.float32)


def experts(
    x: Floats,
    chosen: Ints,
    weights: Floats,
    *,
    matrix: Callable[[int, int], Floats],
    num_experts: int,
    bias: Callable[[int, int], Floats] | None = None,
    activation: Activation = "silu",
) -> Floats:
    """The weighted sum of each token's experts. [T, in] -> [T, in]; `matrix` and `bias`: device.Experts'."""
    results = np.empty((*chosen.shape, x.shape[1]), dtype=np.float32)
    for expert in range(num_experts):
        tokens, ranks = np.nonzero(chosen == expert)
        if len(tokens):
            gate, up, down = ((matrix(expert, which), bias and bias(expert, which)) for which in range(3))
            rows = x[tokens]
            results[tokens, ranks] = linear(gated(linear(rows, *gate), linear(rows, *up), activation), *down)
    y = np.zeros_like(x)
    for rank in range(chosen.shape[1]):
        y += weights[:, rank, None] * results[:, rank]
    return y
