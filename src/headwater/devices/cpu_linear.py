"""Linear layers in plain PyTorch: oneDNN's packed weights where it has them, else F.linear."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class TorchLinear:
    """A linear layer (device.Linear). bfloat16 weights are kept in oneDNN's blocked layout.

    oneDNN reorders a plain weight on every call, which costs more than a small batch's multiplication.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None) -> None:
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.out_features, self.in_features = weight.shape
        self.bias = None if biases is None else torch.cat(list(biases))
        self.is_packed = weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight.contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual += self(x)

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self(x).float() if out is None else out.copy_(self(x))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.unpack()[0])

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (self.weight.to_dense() if self.is_packed else self.weight), self.bias


class TorchGatedLinear:
    """The gated half of an MLP (device.GatedLinear): one linear layer for both halves."""

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
    ) -> None:
        biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
        self._linear = TorchLinear((gate, up), biases)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        weight, bias = self._linear.unpack()
        gate, up = weight.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return gate, up, gate_bias, up_bias
