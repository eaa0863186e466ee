"""The gated half of an MLP on a GPU, over plain or coded matrices."""

from collections.abc import Sequence

import torch

from headwater.devices.cuda.kernels.layers import activate_mul
from headwater.devices.cuda.products.coded_linear import CodedLinear, Weight
from headwater.devices.cuda.products.linear import CudaLinear
from headwater.devices.device import Activation


class CudaGatedLinear:
    """The gated half of an MLP (device.GatedLinear): one product for both halves, then one kernel."""

    def __init__(self, both: CudaLinear | CodedLinear, *, activation: Activation = "silu") -> None:
        """`both`: the rows of gate, then those of up. If that is one matrix, it unpacks to one."""
        self._both = both
        self.activation: Activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        fused = self._both.gated(x, self.activation)
        return self.multiply(self.halves(x)) if fused is None else fused

    def halves(self, x: torch.Tensor) -> torch.Tensor:
        """Both products, gate and up side by side. [T, in] -> [T, 2 out]"""
        return self._both(x)

    def multiply(self, halves: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up. [T, 2 out] -> [T, out]"""
        return activate_mul(halves, self.activation)

    def unpack(self) -> Sequence[tuple[Weight, torch.Tensor | None]]:
        return self._both.unpack()
