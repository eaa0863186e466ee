"""Matrices in MXFP4 in a GPU's memory, in the layout of the kernels of experts (kernels/experts/fp4.py)."""

from dataclasses import dataclass

import numpy as np
import torch

from headwater.devices.host_tensor import HostTensor

MXFP4 = "MXFP4"
BLOCK = 32  # inputs that share an exponent
_BLOCK_BYTES = BLOCK // 2


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Matrix:
    """A matrix [out, in], or a stack of them [..., out, in].

    `codes`: uint8[..., out, in / 2]; byte i of a block has input i in its low bits and input i + 16 in its high ones.
    `exponents`: uint8[..., out, in / 32], of powers of 2, plus 127.
    """

    codes: torch.Tensor
    exponents: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> "Mxfp4Matrix":
        """Matrices of a stack or outputs of a matrix: views."""
        return Mxfp4Matrix(self.codes[index], self.exponents[index])

    def empty_stack(self, *shape: int) -> "Mxfp4Matrix":
        """Memory for other matrices of this kind."""
        *outer, width = shape
        return Mxfp4Matrix(
            self.codes.new_empty((*outer, width // 2)), self.exponents.new_empty((*outer, width // BLOCK))
        )

    def copy_(self, other: "Mxfp4Matrix") -> None:
        self.codes.copy_(other.codes)
        self.exponents.copy_(other.exponents)

    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.exponents]


Stack = torch.Tensor | Mxfp4Matrix  # the matrices of all experts of a layer, [E, out, in]


def parts_of(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and exponents for a kernel; plain numbers twice."""
    return (stack.codes, stack.exponents) if isinstance(stack, Mxfp4Matrix) else (stack, stack)


def place_mxfp4(tensor: HostTensor, device: torch.device) -> Mxfp4Matrix:
    """GGUF's blocks, taken apart on the device."""
    assert tensor.format == MXFP4
    num_rows, width = tensor.shape
    blocks = torch.from_numpy(tensor.data).to(device).reshape(num_rows, width // BLOCK, 1 + _BLOCK_BYTES)
    codes = blocks[:, :, 1:].reshape(num_rows, width // 2).contiguous()
    return Mxfp4Matrix(codes, blocks[:, :, 0].contiguous())


def mxfp4_to_host(matrix: Mxfp4Matrix) -> HostTensor:
    """The inverse of `place_mxfp4`."""
    num_rows, width = matrix.shape
    blocks = np.empty((num_rows, width // BLOCK, 1 + _BLOCK_BYTES), np.uint8)
    blocks[:, :, 0] = matrix.exponents.cpu().numpy()
    blocks[:, :, 1:] = matrix.codes.cpu().numpy().reshape(num_rows, -1, _BLOCK_BYTES)
    return HostTensor(MXFP4, (num_rows, width), blocks.reshape(num_rows, -1))
