"""Sums whose order is the same for every batch: products and log-sum-exps of --deterministic.

A library chooses tiles, and how many programs share one sum, by the number of rows, so a row's bits depend on the
others. Here an output feature of a row is one sum over the columns in one order, in tiles of one size for any number of
rows (the idea: https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/).
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

_TOKENS, _FEATURES, _COLUMNS = 64, 64, 64
_FLOAT32_COLUMNS = 32  # float32 is for tests, and takes twice the space
_VOCABULARY_BLOCK = 4096


def fixed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b. [T, in], [out, in], [out] -> [T, out], in `out` if given: of x's dtype or float32."""
    y = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, weight, bias, y, adds=False)
    return y


def add_fixed_linear(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """residual += x W^T, of float32[T, out]."""
    _launch(x, weight, None, residual, adds=True)


def fixed_logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """float32[R, vocab_size] -> float32[R, 1]"""
    totals = torch.empty((len(logits), 1), dtype=torch.float32, device=logits.device)
    if len(logits):
        _logsumexp_kernel[(len(logits),)](
            logits, totals, logits.shape[1], logits.stride(0), BLOCK=_VOCABULARY_BLOCK, num_warps=8
        )
    return totals


def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool) -> None:
    num_tokens, width = x.shape
    if not num_tokens:
        return
    is_float32 = x.dtype == torch.float32
    x = x.contiguous()
    _linear_kernel[(triton.cdiv(num_tokens, _TOKENS), triton.cdiv(len(weight), _FEATURES))](
        x,
        weight,
        weight if bias is None else bias,
        y,
        num_tokens,
        len(weight),
        width,
        y.stride(0),
        TOKENS=_TOKENS,
        FEATURES=_FEATURES,
        COLUMNS=_FLOAT32_COLUMNS if is_float32 else _COLUMNS,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        num_warps=4,
        num_stages=2 if is_float32 else 4,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,
    weight,
    biases,
    y,
    num_tokens,
    num_features,
    width,
    y_stride,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    is_token, is_feature = token < num_tokens, feature < num_features
    column = tl.arange(0, COLUMNS)
    x_at = x + token.to(tl.int64)[:, None] * width + column[None, :]
    w_at = weight + feature.to(tl.int64)[:, None] * width + column[None, :]
    acc = tl.zeros((TOKENS, FEATURES), tl.float32)
    for first in range(0, width, COLUMNS):
        is_column = (first + column < width)[None, :]
        a = tl.load(x_at + first, mask=is_token[:, None] & is_column, other=0.0)
        b = tl.load(w_at + first, mask=is_feature[:, None] & is_column, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(biases + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    is_in = is_token[:, None] & is_feature[None, :]
    y_at = y + token.to(tl.int64)[:, None] * y_stride + feature[None, :]
    if ADDS:
        acc += tl.load(y_at, mask=is_in, other=0.0)
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=is_in)


@triton.jit
def _logsumexp_kernel(logits, totals, vocab_size, stride, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * stride
    token = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        value = tl.load(row + first + token, mask=first + token < vocab_size, other=-float("inf"))
        best = tl.maximum(best, value)
    largest = tl.max(best, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        value = tl.load(row + first + token, mask=first + token < vocab_size, other=-float("inf"))
        total += tl.exp(value - largest)
    tl.store(totals + tl.program_id(0), largest + tl.log(tl.sum(total, 0)))
