"""GGUF's blocks as codes with scales, taken apart on the device that computes with them.

The blocks are those of ggml-common.h: 32 numbers with a float16 scale (and smallest number), or 256 numbers whose parts
of 32 or 16 have scales of 6 or 8 bits, times one in float16. The product of both is rounded to float16, an error of at
most 2^-11; bfloat16 weights have errors of 2^-9.
"""

from collections.abc import Callable

import torch

from headwater.devices.cuda.products.coded_matrix import CodedMatrix, of_codes
from headwater.devices.host_tensor import HostTensor

_Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes and scales of each block, and offsets


def place_blocks(tensor: HostTensor, device: torch.device) -> CodedMatrix:
    """A matrix in blocks of one of GGUF_FORMATS."""
    num_rows = tensor.shape[0]
    form, size, num_bytes, group, take = _FORMATS[tensor.format]
    blocks = torch.from_numpy(tensor.data).to(device).reshape(-1, num_bytes)
    assert len(blocks) * size == num_rows * tensor.shape[1]
    codes, scales, offsets = take(blocks)
    return of_codes(
        "int4" if form == "int4" else "int8",
        codes.reshape(num_rows, -1),
        scales.reshape(num_rows, -1),
        None if offsets is None else offsets.reshape(num_rows, -1),
        group=group,
    )


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """A float16 of each block: float32[N, 1]"""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _q8_0(blocks: torch.Tensor) -> _Taken:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _q4_0(blocks: torch.Tensor) -> _Taken:
    return torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), dim=1), _half(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> _Taken:
    return torch.cat((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), dim=1), _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets of the 8 parts of each block of 256. float32[N, 8], both"""
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), dim=1)
    smallest = torch.cat((middle & 63, (high >> 4) | (middle >> 6) << 4), dim=1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * smallest


def _k_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """128 bytes to 8 parts of 32 codes: each 32 bytes hold one part in low bits and the next one in high bits."""
    pairs = packed.reshape(-1, 4, 32)
    return torch.stack((pairs & 15, pairs >> 4), dim=2).reshape(-1, 256)


def _q4_k(blocks: torch.Tensor) -> _Taken:
    return (_k_nibbles(blocks[:, 16:]), *_k_scales(blocks))


def _q5_k(blocks: torch.Tensor) -> _Taken:
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth = (blocks[:, None, 16:48] >> bits[None, :, None]) & 1
    codes = _k_nibbles(blocks[:, 48:]) | (fifth << 4).reshape(-1, 256)
    return (codes.view(torch.int8), *_k_scales(blocks))


def _q6_k(blocks: torch.Tensor) -> _Taken:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low_bits = torch.cat((low & 15, low >> 4), dim=2)  # half, quarter of 32
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device)
    high_bits = (high >> shifts[None, None, :, None]) & 3
    codes = (low_bits | high_bits << 4).view(torch.int8).reshape(-1, 256) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes, _half(blocks, 208) * scales, None


# codes, numbers and bytes of a block, numbers that share a scale
_FORMATS: dict[str, tuple[str, int, int, int, Callable[[torch.Tensor], _Taken]]] = {
    "Q8_0": ("int8", 32, 34, 32, _q8_0),
    "Q4_0": ("int4", 32, 18, 32, _q4_0),
    "Q4_1": ("int4", 32, 20, 32, _q4_1),
    "Q4_K": ("int4", 256, 144, 32, _q4_k),
    "Q5_K": ("int8", 256, 176, 32, _q5_k),
    "Q6_K": ("int8", 256, 210, 16, _q6_k),
}
GGUF_FORMATS = frozenset(_FORMATS)
