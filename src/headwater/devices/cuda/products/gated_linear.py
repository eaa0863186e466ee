"""The gated half of an MLP on a GPU, over plain or coded matrices."""

from collections.abc import Sequence

import torch

from headwater.devices.cuda.kernels.layers import activate_mul
from headwater.devices.cuda.kernels.rounded import activate_round
from headwater.devices.cuda.kernels.rows import Like, RoundedRows, Rows
from headwater.devices.cuda.products.coded_linear import CodedLinear, Weight
from headwater.devices.cuda.products.linear import CudaLinear
from headwater.devices.device import Activation


class CudaGatedLinear:
    """The gated half of an MLP (device.GatedLinear): one product for both halves, then one kernel."""

    def __init__(self, both: CudaLinear | CodedLinear, *, activation: Activation = "silu") -> None:
        """`both`: the rows of gate, then those of up. If that is one matrix, it unpacks to one."""
        self._both = both
        self.activation: Activation = activation

    def __call__(self, x: Rows, *, reader: CudaLinear | CodedLinear | None = None) -> torch.Tensor | RoundedRows:
        """[T, in] -> [T, out], as `reader` takes it."""
        if not isinstance(x, RoundedRows) and self._both.gates(len(x)):
            return self._both.gated(x, self.activation)
        group = None if reader is None else reader.rounding(len(x), x)
        if group is None:
            sums = self._both.split_sums(x) if isinstance(self._both, CodedLinear) else None
            if sums is not None:
                return activate_mul(sums, self.activation, dtype=x.dtype)
            return self.multiply(self._halves(x))
        unscaled = self._both.unscaled(x) if isinstance(self._both, CodedLinear) else None
        halves = self._halves(x) if unscaled is None else unscaled
        return activate_round(halves, self.activation, group=group)

    def rounding(self, num_tokens: int, like: Like) -> int | None:
        return self._both.rounding(num_tokens, like)

    def norms(self, num_tokens: int) -> bool:
        return self._both.gates(num_tokens) and self._both.norms(num_tokens)

    def halves(self, x: torch.Tensor) -> torch.Tensor:
        """Both products, gate and up side by side. [T, in] -> [T, 2 out]"""
        return self._halves(x)

    def _halves(self, x: Rows) -> torch.Tensor:
        if isinstance(self._both, CodedLinear):
            return self._both.product(x)
        assert not isinstance(x, RoundedRows)
        return self._both(x)

    def multiply(self, halves: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up. [T, 2 out] -> [T, out]"""
        return activate_mul(halves, self.activation)

    def unpack(self) -> Sequence[tuple[Weight, torch.Tensor | None]]:
        return self._both.unpack()
