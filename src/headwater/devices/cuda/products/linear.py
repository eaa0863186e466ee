"""Linear layers on a GPU over plain [out, in] weights: cuBLAS, and our own kernel for few tokens.

Products add to the residual stream in the same kernel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from headwater.devices.cuda.kernels.few_rows.skinny import (
    add_linear,
    gated_linear,
    linear,
    suits,
    suits_gated,
    suits_logits,
)
from headwater.devices.cuda.kernels.fixed import add_fixed_linear, fixed_linear
from headwater.devices.cuda.kernels.rows import Like, PlainRows, plain_rows
from headwater.devices.device import Activation


class CudaLinear:
    """A linear layer (device.Linear)."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor] | None = None,
        *,
        is_deterministic: bool = False,
    ) -> None:
        """`is_deterministic`: a row's bits do not depend on the other rows (kernels/fixed.py)."""
        self.is_deterministic = is_deterministic
        self._weight = weights[0].contiguous() if len(weights) == 1 else torch.cat(list(weights))
        self._bias = None if biases is None else biases[0] if len(biases) == 1 else torch.cat(list(biases))
        self._sizes = [len(weight) for weight in weights]
        self.out_features, self.in_features = self._weight.shape
        # bfloat16 factors, float32 results: neither the residual stream nor the logits are rounded in between
        self._widens = self._weight.is_cuda and self._weight.dtype != torch.float32

    def rounding(self, num_tokens: int, like: Like) -> None:
        """Inputs are not read in float8."""

    def norms(self, num_tokens: int) -> bool:
        """Whether the norm of so many tokens is best computed along with the product."""
        return not self.is_deterministic and suits(num_tokens, self.out_features)

    def parts(self, x: torch.Tensor) -> None:
        """`add_to` adds within the product."""

    def __call__(self, x: PlainRows, *, reader: object = None) -> torch.Tensor:
        if self.is_deterministic:
            return fixed_linear(plain_rows(x), self._weight, self._bias)
        if suits(len(x), self.out_features):
            return linear(x, self._weight, self._bias)
        return F.linear(plain_rows(x), self._weight, self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        if self._bias is not None:
            residual += self._bias
        if self.is_deterministic:
            add_fixed_linear(residual, x, self._weight)
        elif suits(len(x), self.out_features):
            add_linear(residual, x, self._weight)
        elif self._widens:
            torch.addmm(residual, x, self._weight.t(), out_dtype=torch.float32, out=residual)
        elif self._weight.dtype == torch.float32:
            residual.addmm_(x, self._weight.t())
        else:
            residual += F.linear(x, self._weight)

    def logits(self, x: PlainRows, out: torch.Tensor | None = None) -> torch.Tensor:
        if self.is_deterministic:
            y = torch.empty((len(x), self.out_features), dtype=torch.float32, device=x.device) if out is None else out
            return fixed_linear(plain_rows(x), self._weight, self._bias, y)
        if out is None and suits_logits(len(x), self.out_features):
            return linear(x, self._weight, self._bias, dtype=torch.float32)
        x = plain_rows(x)
        if self._widens and self._bias is None:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32, out=out)
        return self(x).float() if out is None else out.copy_(self(x))

    def embed(self, token_ids: torch.Tensor, *, first_token: int | None = None, scale: float = 1.0) -> torch.Tensor:
        if first_token is None:
            found = F.embedding(token_ids, self._weight).float()
        else:
            rows = token_ids - first_token
            inside = rows.clamp(0, self.out_features - 1)
            found = F.embedding(inside, self._weight).float() * (rows == inside)[:, None]
        return found if scale == 1.0 else found.mul_(scale)

    def unpack(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        biases = [None] * len(self._sizes) if self._bias is None else self._bias.split(self._sizes)
        return list(zip(self._weight.split(self._sizes), biases, strict=True))

    def gates(self, num_tokens: int) -> bool:
        """Whether one kernel computes both halves of a gated layer at once."""
        return not self.is_deterministic and suits_gated(num_tokens, self._weight)

    def gated(self, x: PlainRows, activation: Activation) -> torch.Tensor:
        """activation of the first half of the outputs times the second half. [T, in] -> [T, out / 2]"""
        return gated_linear(x, self._weight, self._bias, activation)
