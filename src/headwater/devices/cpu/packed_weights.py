"""Weights of linear layers and embeddings in the layout of the CPU kernels (kernels/linear/packed.h), and back.

GGUF's blocks are moved, not converted: the packed weights have exactly the file's values.
"""

import ctypes
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.errors import MixedFormatsError
from headwater.devices.host_tensor import HostTensor

BLOCK_COLS = 16  # outputs of a block
FORMATS = ("float32", "bfloat16", "float16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")  # enum Format
# (numbers, bytes) of a block in the file
_FILE_BLOCKS = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q4_K": (256, 144), "Q5_K": (256, 176),
                "Q6_K": (256, 210), "MXFP4": (32, 17)}  # fmt: skip
_BYTES_PER_TASK = 4 << 20

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """A matrix [out_features, in_features], or two of them whose blocks alternate (`is_gated`: gate and up).

    `blocks` is uint8[num_blocks, bytes of a block], aligned to 64 bytes; `bias` is float32[num_blocks, 16] or None.
    """

    format: str
    in_features: int
    out_features: int  # of the product: of gate alone if gated
    is_gated: bool
    blocks: npt.NDArray[np.uint8]
    bias: Floats | None

    @property
    def format_id(self) -> int:
        return FORMATS.index(self.format)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


def has_tiles(library: KernelLibrary) -> bool:
    """Whether prompts' rows are multiplied in AMX's tiles: then bfloat16 weights as well take other activations."""
    return converts_activations(library, "bfloat16")


def converts_activations(library: KernelLibrary, format: str) -> bool:
    """Whether products with weights of this format take what the kernel `quantize` makes of float32."""
    return bool(library.functions.hw_converts_activations(ctypes.c_int64(FORMATS.index(format))))


def activation_bytes(library: KernelLibrary, format: str, in_features: int) -> int:
    """Bytes of one row of activations for products with weights of this format. Q4_0 to MXFP4 take the same ones."""
    function = library.functions.hw_activation_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(FORMATS.index(format)), ctypes.c_int64(in_features))


def register_bytes(library: KernelLibrary, format: str, in_features: int) -> int:
    """Bytes of one row of activations for products in registers, which experts' always are."""
    function = library.functions.hw_register_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(FORMATS.index(format)), ctypes.c_int64(in_features))


def packed_format(tensor: HostTensor) -> str:
    """The format in which a weight is packed: its own, or float32 where the kernels have none for it."""
    is_odd = tensor.format == "bfloat16" and tensor.shape[-1] % 2 == 1  # bfloat16 is packed in pairs of inputs
    return tensor.format if tensor.format in FORMATS and not is_odd else "float32"


def pack(
    library: KernelLibrary, weights: Sequence[HostTensor], biases: Sequence[Floats] | None = None, *, threads: int = 1
) -> PackedWeights:
    """Pack matrices [out_i, in] as one [sum of out_i, in]. ValueError if their formats or shapes do not fit."""
    format, in_features = _common(weights, biases)
    rows = _joined(weights, format)
    out_features = sum(len(data) for data in rows)
    blocks = _zeros(-(-out_features // BLOCK_COLS), _block_bytes(library, format, in_features))
    first = 0
    for data in rows:
        _pack_rows(library, format, data, in_features, blocks[first // BLOCK_COLS :], threads)
        first += len(data)
    bias = None if biases is None else _padded(np.concatenate(list(biases)), len(blocks))
    return PackedWeights(format, in_features, out_features, False, blocks, bias)


def pack_gated(
    library: KernelLibrary, weights: Sequence[HostTensor], biases: Sequence[Floats] | None = None, *, threads: int = 1
) -> PackedWeights:
    """Pack gate and up, both [out, in], for silu(gate) * up. ValueError if their formats or shapes differ."""
    format, in_features = _common(weights, biases)
    if len(weights) != 2 or weights[0].shape != weights[1].shape:
        raise ValueError(f"gate and up must have one shape, not {' and '.join(str(w.shape) for w in weights)}")
    out_features = weights[0].shape[0]
    num_pairs = -(-out_features // BLOCK_COLS)
    blocks = _zeros(2 * num_pairs, _block_bytes(library, format, in_features))
    for i, weight in enumerate(weights):
        _pack_rows(library, format, _rows_of(weight, format), in_features, blocks[i::2], threads)
    bias = None
    if biases is not None:
        bias = np.stack([_padded(b, num_pairs) for b in biases], axis=1).reshape(-1, BLOCK_COLS)
    return PackedWeights(format, in_features, out_features, True, blocks, bias)


def empty_stack(library: KernelLibrary, first: Sequence[HostTensor], num: int) -> PackedWeights:
    """Blocks for `num` matrices like `first`, one after another, or for `num` pairs of gate and up.

    The sizes are those of one matrix. MixedFormatsError if gate and up differ in shape or format.
    """
    format, out_features, in_features = _kind_of_experts(first)
    num_blocks = num * len(first) * -(-out_features // BLOCK_COLS)
    blocks = _zeros(num_blocks, _block_bytes(library, format, in_features))
    return PackedWeights(format, in_features, out_features, len(first) == 2, blocks, None)


def part_of_stack(stack: PackedWeights, first: int, num: int = 1) -> PackedWeights:
    """`num` matrices, or pairs, from `first` of a stack on: a view."""
    size = (2 if stack.is_gated else 1) * -(-stack.out_features // BLOCK_COLS)
    blocks = slice(first * size, (first + num) * size)
    return replace(stack, blocks=stack.blocks[blocks], bias=None if stack.bias is None else stack.bias[blocks])


def with_biases(stack: PackedWeights, biases: Sequence[Floats]) -> PackedWeights:
    """The stack with the biases of all matrices, each float32[num, out]: of gate and up in turn if it is gated."""
    num, num_cols = len(biases[0]), -(-stack.out_features // BLOCK_COLS) * BLOCK_COLS
    padded = np.zeros((num, len(biases), num_cols), np.float32)
    for i, bias in enumerate(biases):
        padded[:, i, : stack.out_features] = bias
    blocks = padded.reshape(num, len(biases), -1, BLOCK_COLS).swapaxes(1, 2).reshape(-1, BLOCK_COLS)
    return replace(stack, bias=np.ascontiguousarray(blocks))


def pack_in_stack(library: KernelLibrary, stack: PackedWeights, index: int, weights: Sequence[HostTensor]) -> None:
    """Put a matrix, or gate and up, at `index` of a stack. MixedFormatsError if it is not like the others."""
    found, wanted = _kind_of_experts(weights), (stack.format, stack.out_features, stack.in_features)
    if found != wanted:
        raise MixedFormatsError(f"the experts of a layer have one format and shape, not {wanted} and {found}")
    format, _, in_features = found
    blocks = part_of_stack(stack, index).blocks
    for i, weight in enumerate(weights):
        _pack_rows(library, format, _rows_of(weight, format), in_features, blocks[i :: len(weights)], 1)


def _kind_of_experts(weights: Sequence[HostTensor]) -> tuple[str, int, int]:
    """The format, outputs and inputs of a matrix, or of gate and up."""
    found = {(packed_format(weight), *weight.shape) for weight in weights}
    if len(found) != 1:
        raise MixedFormatsError(f"gate and up of an expert have one format and shape, not {found}")
    format, in_features = _common(weights, None)
    return format, weights[0].shape[0], in_features


def unpack(library: KernelLibrary, packed: PackedWeights) -> list[Floats]:
    """The matrix, float32[out_features, in_features]; gate and up if gated. The file's values, bit for bit."""
    step = 2 if packed.is_gated else 1
    return [_unpack_rows(library, packed, packed.blocks[i::step]) for i in range(step)]


def _common(weights: Sequence[HostTensor], biases: Sequence[Floats] | None) -> tuple[str, int]:
    """The format and the number of inputs that the weights share."""
    shapes = ", ".join(str(weight.shape) for weight in weights)
    if any(len(weight.shape) != 2 or 0 in weight.shape for weight in weights):
        raise ValueError(f"weights of linear layers are matrices that are not empty, not of shapes {shapes}")
    if len({weight.shape[1] for weight in weights}) != 1:
        raise ValueError(f"weights that are packed together have one number of inputs, not shapes {shapes}")
    if biases is not None and [b.shape for b in biases] != [(weight.shape[0],) for weight in weights]:
        raise ValueError(f"biases of shapes {[b.shape for b in biases]} do not fit weights of shapes {shapes}")
    formats = {packed_format(weight) for weight in weights}
    if len(formats) != 1:
        raise ValueError(f"weights that are packed together have one format, not {', '.join(sorted(formats))}")
    for weight in weights:
        _check_blocks(weight)
    return formats.pop(), weights[0].shape[1]


def _check_blocks(weight: HostTensor) -> None:
    """The kernels would leave out the inputs behind the last whole block."""
    num_numbers, num_bytes = _FILE_BLOCKS.get(weight.format, (1, 0))
    num_blocks, rest = divmod(weight.shape[1], num_numbers)
    if rest or (num_bytes and weight.data.shape[1] != num_blocks * num_bytes):
        raise ValueError(
            f"a {weight.format} matrix has whole blocks of {num_numbers} inputs in {num_bytes} bytes, not "
            f"{weight.shape[1]} inputs in {weight.data.shape[1]} bytes"
        )


def _rows_of(weight: HostTensor, format: str) -> npt.NDArray:
    """The rows of the weight in this format, as they lie in memory: [out, ...]."""
    data = weight.to_float32() if format == "float32" else weight.data
    return data if data.strides[-1] == data.itemsize else np.ascontiguousarray(data)


def _joined(weights: Sequence[HostTensor], format: str) -> list[npt.NDArray]:
    """The rows of all weights. Each part but the last fills whole blocks; rows are copied only where it must be."""
    rows = [_rows_of(weight, format) for weight in weights]
    return rows if all(len(data) % BLOCK_COLS == 0 for data in rows[:-1]) else [np.concatenate(rows)]


def _pack_rows(
    library: KernelLibrary, format: str, rows: npt.NDArray, in_features: int, blocks: npt.NDArray, threads: int
) -> None:
    pack_some = library.functions.hw_pack
    format_id = FORMATS.index(format)

    def pack_part(first: int, end: int) -> None:
        pack_some(
            ctypes.c_int64(format_id), ctypes.c_void_p(rows[first:].ctypes.data), ctypes.c_int64(rows.strides[0]),
            ctypes.c_int64(min(end, len(rows)) - first), ctypes.c_int64(in_features),
            ctypes.c_void_p(blocks[first // BLOCK_COLS :].ctypes.data), ctypes.c_int64(blocks.strides[0]),
        )  # fmt: skip

    per_task = max(1, _BYTES_PER_TASK // blocks.shape[1]) * BLOCK_COLS
    parts = [(first, first + per_task) for first in range(0, len(rows), per_task)]
    if threads == 1 or len(parts) == 1:
        for part in parts:
            pack_part(*part)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: pack_part(*part), parts))


def _unpack_rows(library: KernelLibrary, packed: PackedWeights, blocks: npt.NDArray[np.uint8]) -> Floats:
    out = np.empty((packed.out_features, packed.in_features), np.float32)
    library.functions.hw_unpack(
        ctypes.c_int64(packed.format_id), ctypes.c_void_p(blocks.ctypes.data), ctypes.c_int64(blocks.strides[0]),
        ctypes.c_int64(packed.in_features), ctypes.c_int64(packed.out_features), ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    return out


def _block_bytes(library: KernelLibrary, format: str, in_features: int) -> int:
    function = library.functions.hw_block_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(FORMATS.index(format)), ctypes.c_int64(in_features))


def _zeros(num_blocks: int, bytes_per_block: int) -> npt.NDArray[np.uint8]:
    """uint8[num_blocks, bytes_per_block] zeros that begin at a page.

    They are mapped by themselves: malloc keeps freed memory, and an update of weights frees as much as it takes.
    """
    memory = mmap.mmap(-1, num_blocks * bytes_per_block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, bytes_per_block)


def _padded(bias: Floats, num_blocks: int) -> Floats:
    padded = np.zeros(num_blocks * BLOCK_COLS, np.float32)
    padded[: len(bias)] = bias
    return padded.reshape(num_blocks, BLOCK_COLS)
