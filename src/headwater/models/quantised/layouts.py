"""The tensors of one quantised module, and the matrix that they hold.

Codes of 4 or 8 bits lie in int32 words, the first one in the lowest bits:

  gptq     qweight [in / n, out], n codes of one output in a word; qzeros [groups, out / n]; scales [groups, out];
           g_idx [in]: the group of each input
  awq      qweight [in, out / 8], qzeros [groups, out / 8]; code i of a word is that of output 0, 2, 4, 6, 1, 3, 5, 7
  packed   weight_packed [out, in / n], weight_scale [out, groups], weight_zero_point [out / n, groups],
           weight_g_idx [in]
  int8     weight int8[out, in], weight_scale [out, 1] or of one number, weight_zero_point like it
  float8   weight float8_e4m3fn[out, in], weight_scale like int8's or [out / 128, in / 128], or weight_scale_inv
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor
from headwater.devices.own_memory import empty
from headwater.devices.safetensors_header import StoredTensor
from headwater.devices.scaled_tensor import MIDDLE, ScaledTensor
from headwater.models.quantised.scheme import Scheme

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each code of a word
_SCALE_TYPES = ("F16", "BF16", "F32")
_CODE_TYPES = {"gptq": "I32", "awq": "I32", "packed": "I32", "int8": "I8", "float8": "F8_E4M3"}
_WORD_BITS = 32

Load = Callable[[str], HostTensor]  # one tensor of the module
Words = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def is_codes(scheme: Scheme, marker: StoredTensor) -> bool:
    """Whether the module's marker holds codes, and not plain numbers under the same name."""
    return marker.dtype == _CODE_TYPES[scheme.layout]


def shape_of(scheme: Scheme, marker: StoredTensor) -> tuple[int, int]:
    """[out, in] of the matrix. ValueError if the marker is no matrix."""
    if len(marker.shape) != 2 or 0 in marker.shape:
        raise ValueError(f"has shape {list(marker.shape)}, and codes are matrices")
    rows, columns = marker.shape
    per_word = _WORD_BITS // scheme.bits
    if scheme.layout == "gptq":
        return (columns, rows * per_word)
    if scheme.layout == "awq":
        return (columns * per_word, rows)
    return (rows, columns * per_word) if scheme.layout == "packed" else (rows, columns)


def expected(scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, tuple[tuple[str, ...], list[tuple[int, ...]]]]:
    """The types and the shapes that the tensors beside the marker may have."""
    num_rows, num_columns = shape
    high, wide = scheme.tile_of(shape)
    tiles = (-(-num_rows // high), -(-num_columns // wide))
    words = -(-num_rows * scheme.bits // _WORD_BITS)
    if scheme.layout in ("gptq", "awq"):
        return {
            "qzeros": (("I32",), [(tiles[1], words)]),
            "scales": (_SCALE_TYPES, [(tiles[1], num_rows)]),
            "g_idx": (("I32", "I64"), [(num_columns,)]),
        }
    if scheme.layout == "packed":
        return {
            "weight_scale": (_SCALE_TYPES, [tiles]),
            "weight_shape": (("I64", "I32"), [(2,)]),
            "weight_zero_point": (("I32",), [(words, tiles[1])]),
            "weight_g_idx": (("I32", "I64"), [(num_columns,)]),
        }
    vectors = [(tiles[0],)] if tiles[1] == 1 else []
    shapes: list[tuple[int, ...]] = [tiles, *vectors, *([()] if tiles == (1, 1) else [])]
    return {
        scheme.scale_name: (_SCALE_TYPES, shapes),
        "weight_zero_point": (("I8", "I32", *_SCALE_TYPES), shapes),
    }


def read(scheme: Scheme, shape: tuple[int, int], load: Load, found: frozenset[str]) -> ScaledTensor:
    """The matrix. `found` are the module's tensors. ValueError for contents that the layout does not allow."""
    if scheme.layout in ("gptq", "awq"):
        return _read_words(scheme, shape, load, found)
    if scheme.layout == "packed":
        return _read_packed(scheme, shape, load, found)
    tile = scheme.tile_of(shape)
    scales = load(scheme.scale_name).to_float32().reshape(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    codes = load("weight").data
    if scheme.layout == "float8":
        return ScaledTensor("float8_e4m3fn", shape, codes, scales, tile=tile)
    offsets = None
    if "weight_zero_point" in found:
        offsets = _offsets(load("weight_zero_point").to_float32().reshape(scales.shape), scales, usual=0)
    return ScaledTensor("int8", shape, codes, scales, tile=tile, offsets=offsets)


def _read_words(scheme: Scheme, shape: tuple[int, int], load: Load, found: frozenset[str]) -> ScaledTensor:
    """Layouts whose scales lie [groups, out]."""
    order = AWQ_ORDER if scheme.layout == "awq" else tuple(range(_WORD_BITS // scheme.bits))
    most = (1 << scheme.bits) - 1
    stored = _unpacked(load("qzeros").data, scheme.bits, order)[:, : shape[0]]
    zeros = (stored.astype(np.int16) + scheme.zero_offset) & most  # tools differ in what they make of 16: it is 0
    if scheme.layout == "awq":
        codes = _awq_codes(load("qweight").data)
    else:
        codes = _turned(load("qweight").data).view(np.uint8)
    scales = np.ascontiguousarray(load("scales").to_float32().T)
    groups = load("g_idx").data if "g_idx" in found else None
    return _integers(scheme, shape, codes, scales, zeros=np.ascontiguousarray(zeros.T), groups=groups)


def _read_packed(scheme: Scheme, shape: tuple[int, int], load: Load, found: frozenset[str]) -> ScaledTensor:
    named = tuple(load("weight_shape").data.tolist())
    if named != shape:
        raise ValueError(f"weight_shape is {list(named)}, and weight_packed holds {list(shape)}")
    zeros = None
    if "weight_zero_point" in found:
        order = tuple(range(_WORD_BITS // scheme.bits))
        zeros = _unpacked(np.ascontiguousarray(load("weight_zero_point").data.T), scheme.bits, order)
        zeros = np.ascontiguousarray(zeros[:, : shape[0]].T).astype(np.int16)
    groups = load("weight_g_idx").data if "weight_g_idx" in found else None
    codes = load("weight_packed").data.view(np.uint8)
    scales = load("weight_scale").to_float32()
    return _integers(scheme, shape, codes, scales, zeros=zeros, groups=groups)


def _integers(
    scheme: Scheme,
    shape: tuple[int, int],
    codes: Bytes,
    scales: Floats,
    *,
    zeros: npt.NDArray[np.int16] | None,
    groups: npt.NDArray[np.integer] | None,
) -> ScaledTensor:
    """`codes` lie along the inputs, unsigned; `zeros` are unsigned as well, and None for the middle."""
    _, wide = tile = scheme.tile_of(shape)
    order = None if groups is None else _order_of(groups, wide, scheme)
    if scheme.bits == 4:
        codes = codes if order is None else _reordered(codes, order)
        offsets = None if zeros is None else _offsets(zeros, scales, usual=MIDDLE)
        return ScaledTensor("int4", shape, codes, scales, tile=tile, offsets=offsets, order=order)
    signed = (codes ^ 0x80).view(np.int8)
    signed = signed if order is None else signed[:, order]
    offsets = None if zeros is None else _offsets(zeros - 128, scales, usual=0)
    return ScaledTensor("int8", shape, signed, scales, tile=tile, offsets=offsets, order=order)


def _order_of(groups: npt.NDArray[np.integer], wide: int, scheme: Scheme) -> npt.NDArray[np.intp] | None:
    """The inputs sorted by their group; None if they are sorted. ValueError if a group has another size."""
    usual = np.arange(len(groups)) // wide
    if (groups == usual).all():
        return None
    order = np.argsort(groups, kind="stable")
    if not (groups[order] == usual).all():
        raise ValueError(f"g_idx does not give every group {wide} inputs")
    if not scheme.has_order:
        raise ValueError("g_idx puts the inputs in another order, and the config has no desc_act (actorder)")
    return order


def _offsets(zeros: npt.NDArray, scales: Floats, *, usual: int) -> Floats | None:
    """What is added to code * scale: (code - zero) * scale is meant. None if every zero is the usual one."""
    return None if (zeros == usual).all() else -zeros.astype(np.float32) * scales


def _unpacked(words: Words, bits: int, order: tuple[int, ...]) -> Bytes:
    """Codes of int32[rows, words]: uint8[rows, words * n]. Code i of a word becomes number order[i] of its n."""
    out = np.empty((*words.shape, len(order)), dtype=np.uint8)
    unsigned = words.view(np.uint32)
    for i, place in enumerate(order):
        out[:, :, place] = (unsigned >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
    return out.reshape(len(words), -1)


def _awq_codes(words: Words) -> Bytes:
    """int32[in, out / 8] to codes along the inputs: uint8[out, in / 2]."""
    num_inputs, num_words = words.shape
    pairs = np.ascontiguousarray(words.T).view(np.uint8).reshape(num_words, num_inputs, 4)
    out = empty((num_words, len(AWQ_ORDER), num_inputs // 2), np.uint8)
    for i, place in enumerate(AWQ_ORDER):
        even, odd = pairs[:, 0::2, i // 2], pairs[:, 1::2, i // 2]
        out[:, place] = (even >> 4) | (odd & 0xF0) if i % 2 else (even & 15) | (odd << 4)
    return out.reshape(-1, num_inputs // 2)


def _turned(words: Words) -> Words:
    out = empty(words.shape[::-1], np.int32)
    out[...] = words.T
    return out


def _reordered(codes: Bytes, order: npt.NDArray[np.intp]) -> Bytes:
    """Column i becomes column order[i], of pairs of codes. uint8[out, in / 2]"""
    out = empty(codes.shape, np.uint8)
    step = max(1, (1 << 20) // codes.shape[1])
    for start in range(0, len(codes), step):
        some = codes[start : start + step]
        numbers = np.stack((some & 15, some >> 4), axis=-1).reshape(len(some), -1)[:, order]
        out[start : start + step] = numbers[:, 0::2] | numbers[:, 1::2] << 4
    return out
