"""Plain weights in GGUF's blocks of 8 or 4 bits: 32 numbers of a row share a scale. numpy alone.

The blocks are those of llama.cpp's reference quantiser (quantize_row_q8_0_ref, quantize_row_q4_0_ref in ggml-quants.c),
but for numbers halfway between two of Q8_0's steps, which go to the even one here.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor
from headwater.devices.own_memory import empty

BLOCK = 32
_NUMBERS_AT_ONCE = 1 << 20  # temporary arrays stay small beside the tensor


def can_quantise(tensor: HostTensor) -> bool:
    """Whether its rows are whole blocks of plain numbers. Vectors (norms, biases) stay as they are."""
    return len(tensor.shape) == 2 and tensor.shape[1] % BLOCK == 0 and not tensor.has_blocks


def quantise(tensor: HostTensor, form: str) -> HostTensor:
    """The matrix in blocks of `form`, "Q8_0" or "Q4_0". Other Python threads run meanwhile."""
    assert can_quantise(tensor)
    to_blocks, block_bytes = _FORMS[form]
    num_rows, num_cols = tensor.shape
    out = empty((num_rows, num_cols // BLOCK, block_bytes), np.uint8)
    at_once = max(1, _NUMBERS_AT_ONCE // num_cols)
    for start in range(0, num_rows, at_once):
        rows = tensor.rows(start, min(start + at_once, num_rows)).to_float32()
        to_blocks(rows.reshape(len(rows), -1, BLOCK), out[start : start + at_once])
    return HostTensor(form, tensor.shape, out.reshape(num_rows, -1))


def _to_q8_0(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> None:
    """The scale as float16, then 32 times int8."""
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    out[..., :2] = scales.astype(np.float16).view(np.uint8)
    out[..., 2:] = np.rint(values * _inverse(scales)).astype(np.int8).view(np.uint8)


def _to_q4_0(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> None:
    """The scale as float16, then numbers 0 to 15 for -8 to 7 scales: the first half in low bits, the second in high."""
    largest, smallest = values.max(axis=-1, keepdims=True), values.min(axis=-1, keepdims=True)
    scales = np.where(largest > -smallest, largest, smallest) / np.float32(-8)  # the largest number becomes -8 scales
    numbers = (values * _inverse(scales) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    out[..., :2] = scales.astype(np.float16).view(np.uint8)
    out[..., 2:] = numbers[..., : BLOCK // 2] | numbers[..., BLOCK // 2 :] << 4


def _inverse(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


_FORMS: dict[str, tuple[Callable[[npt.NDArray[np.float32], npt.NDArray[np.uint8]], None], int]] = {
    "Q8_0": (_to_q8_0, 34),
    "Q4_0": (_to_q4_0, 18),
}
