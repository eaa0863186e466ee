"""Linear layers in plain PyTorch: oneDNN's packed weights where they work, else float32 products of plain weights."""

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F

_FEW_ROWS = 2  # up to here PyTorch's own product of 16-bit numbers is as fast as widening the weight
_WIDE_NUMBERS = 1 << 19  # of a weight in float32 at a time: 2 MiB stay in the cache, a whole matrix does not

logger = logging.getLogger(__name__)


class TorchLinear:
    """A linear layer (device.Linear). 16-bit weights are kept in oneDNN's blocked layout if oneDNN computes with it.

    oneDNN reorders a plain weight on every call, which costs more than the multiplication of a small batch. Without
    oneDNN, PyTorch multiplies 16-bit matrices ten times slower than float32 ones, so blocks of the weight are widened.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None) -> None:
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.out_features, self.in_features = weight.shape
        self.bias = None if biases is None else torch.cat(list(biases))
        self.is_packed = can_pack(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight.contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x).to(x.dtype)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual += self._multiply(x)

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._multiply(x).float() if out is None else out.copy_(self._multiply(x))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.unpack()[0])

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (self.weight.to_dense() if self.is_packed else self.weight), self.bias

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b, in float32 or the weight's dtype."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.weight.dtype == torch.float32 or len(x) <= _FEW_ROWS:
            return F.linear(x, self.weight, self.bias)
        return _widened_linear(x, self.weight, self.bias)


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


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this 16-bit type here and multiplies them correctly.

    It is tried rather than looked up: the answer depends on the processor, the build of oneDNN, and the instruction
    sets that the environment allows (ONEDNN_MAX_CPU_ISA).
    """
    if dtype == torch.float32:
        return False
    name = str(dtype).removeprefix("torch.")
    try:
        is_right = _is_packed_product_right(dtype)
        reason = "its product is wrong"
    except RuntimeError as error:
        is_right, reason = False, str(error).splitlines()[0]
    if not is_right:
        logger.info("oneDNN does not compute %s here, so such weights are widened to float32: %s", name, reason)
    return is_right


def _is_packed_product_right(dtype: torch.dtype) -> bool:
    """Compare a small product, of one row and of several, with float32's. RuntimeError if oneDNN has none."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, 64, generator=generator).to(dtype) for size in (48, 17))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    is_right = torch.equal(packed.to_dense(), weight)
    expected = F.linear(x.float(), weight.float())
    for rows in (1, len(x)):
        found = torch.ops.mkldnn._linear_pointwise(x[:rows], packed, None, "none", [], "")
        is_right = is_right and torch.allclose(found.float(), expected[:rows], rtol=0, atol=0.5)
    return is_right


def _widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b in float32, a block of output features at a time. [T, in] -> float32[T, out]"""
    wide = x.float()
    y = torch.empty((len(x), len(weight)), dtype=torch.float32)
    num_rows = max(1, _WIDE_NUMBERS // weight.shape[1])
    for start in range(0, len(weight), num_rows):
        block = weight[start : start + num_rows].float()
        y[:, start : start + len(block)] = F.linear(wide, block)
    return y if bias is None else y.add_(bias)
