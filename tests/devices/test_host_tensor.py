"""Host tensors: rounding at its edges, blocks that stay whole."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor


def _floats(*bits: int) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(np.float32)


def test_bfloat16_rounds_to_nearest_with_ties_to_even() -> None:
    values = _floats(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7FFFFF, 0x7F800001, 0x00008000)
    found = HostTensor.of(values).astype("bfloat16")
    # tie down to even, tie up, just above, just below, a negative tie, to infinity, NaN stays one, a subnormal tie
    assert [hex(bits) for bits in found.data] == [
        "0x3f80",
        "0x3f82",
        "0x3f81",
        "0x3f80",
        "0xbf82",
        "0x7f80",
        "0x7fc0",
        "0x0",
    ]
    assert (found.format, found.shape, found.nbytes) == ("bfloat16", (8,), 16)


def test_what_is_too_large_for_float16_becomes_infinite_without_a_warning() -> None:
    found = HostTensor.of(np.array([65504.0, 65520.0, -1e9, 6e-8], dtype=np.float32)).astype("float16")
    assert found.data.tolist() == [65504.0, np.inf, -np.inf, np.float16(6e-8)]


def test_a_conversion_in_pieces_gives_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are converted some at a time; a piece must not be lost, nor the last one be cut."""
    values = np.random.default_rng(0).standard_normal((5, 7), dtype=np.float32)
    whole = HostTensor.of(values).astype("bfloat16").data
    monkeypatch.setattr("headwater.devices.host_tensor._NUMBERS_AT_ONCE", 4)
    assert (HostTensor.of(values).astype("bfloat16").data == whole).all()


def test_nothing_is_converted_without_need_nor_to_a_format_that_is_none() -> None:
    tensor = HostTensor.of(np.ones((2, 3), dtype=np.float32))
    assert tensor.astype("float32") is tensor and tensor.to_float32() is tensor.data
    with pytest.raises(ValueError, match="weights are converted to float32, bfloat16, float16, not to 'int8'"):
        tensor.astype("int8")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rows_of_blocks_are_taken_whole(name: str) -> None:
    """The heads of a llama file are put in order while its blocks stay quantised."""
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).standard_normal((6, 64), dtype=np.float32)
    blocks = quantize(values, kind)
    tensor = HostTensor(name, (6, 64), blocks)
    expected = dequantize(blocks, kind)
    order = np.array([4, 0, 5, 5])
    assert tensor.has_blocks and tensor.nbytes == 6 * 2 * GGML_QUANT_SIZES[kind][1]
    assert (tensor.to_float32() == expected).all()
    taken, cut = tensor.take_rows(order), tensor.rows(1, 3)
    assert (taken.format, taken.shape, cut.shape) == (name, (4, 64), (2, 64))
    assert (taken.to_float32() == expected[order]).all() and (cut.to_float32() == expected[1:3]).all()
    assert (tensor.astype("bfloat16").data == HostTensor.of(expected).astype("bfloat16").data).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256_numbers_are_read_as_gguf_reads_them(name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = np.random.default_rng(2).integers(0, 60, (3, 2 * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    assert np.array_equal(HostTensor(name, (3, 512), data).to_float32(), dequantize(data, kind), equal_nan=True)


def test_unknown_blocks_are_named() -> None:
    with pytest.raises(ValueError, match="numbers of format 'Q9_X' cannot be read"):
        HostTensor("Q9_X", (1, 32), np.zeros((1, 18), dtype=np.uint8)).to_float32()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STORAGE_TYPES if name != "float32"])
def test_every_format_is_widened_as_torch_does(name: str) -> None:
    torch = pytest.importorskip("torch")
    storage = STORAGE_TYPES[name]
    data = np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8).view(storage)
    if storage.itemsize <= 2 and name != "bool":
        data = np.arange(1 << 8 * storage.itemsize).astype(f"u{storage.itemsize}").view(storage)  # all there are
    if name == "bool":
        data = np.array([True, False])
    expected = torch.from_numpy(data.view(np.uint8)).view(getattr(torch, name)).float().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        found = HostTensor(name, data.shape, data).to_float32()
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "float64"])
def test_every_number_is_rounded_as_torch_does(name: str, source: str) -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(4).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    bits[: 1 << 16] = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000  # all ties of bfloat16
    with np.errstate(invalid="ignore"):
        values = bits.view(np.float32).astype(source)
    found = HostTensor.of(values).astype(name).to_float32()
    expected = torch.from_numpy(values).to(getattr(torch, name)).float().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
