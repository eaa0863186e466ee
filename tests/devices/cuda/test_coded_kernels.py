"""Kernels over codes of 4 and 8 bits against plain numbers; without a GPU under Triton's interpreter."""

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.coded.int4_tiles import int4_parts, int4_tiles, splits_int4
from headwater.devices.cuda.kernels.coded.numbers import to_numbers
from headwater.devices.cuda.kernels.coded.tiles import tiles
from headwater.devices.cuda.kernels.rounded import round_tokens
from headwater.devices.cuda.products.coded_matrix import (
    CodedMatrix,
    can_hold,
    codes_to_host,
    join,
    of_words,
    place_codes,
    round_to_float8,
    to_words,
)
from headwater.devices.cuda.products.gguf_codes import GGUF_FORMATS
from headwater.devices.cuda.products.scaled_product import scaled_product, suits_scaled_product
from headwater.devices.host_tensor import HostTensor
from headwater.devices.number_formats import narrow
from headwater.devices.scaled_tensor import ScaledTensor

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(form: str, shape: tuple[int, int], tile: tuple[int, int], *, offsets_are: str = "") -> ScaledTensor:
    """`offsets_are`: "zeros", of whole codes, or "any"."""
    rng = np.random.default_rng(0)
    tiles = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    scales = rng.uniform(0.01, 0.02, size=tiles).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 16, size=tiles) if offsets_are == "zeros" else rng.uniform(0, 15, size=tiles)
    offsets = -zeros.astype(np.float32) * scales if offsets_are else None
    codes = rng.integers(0, 256, size=(shape[0], shape[1] // (2 if form == "int4" else 1))).astype(np.uint8)
    if form == "int8":
        codes = codes.view(np.int8)
    if form == "float8_e4m3fn":
        codes = narrow(rng.normal(scale=20, size=shape).astype(np.float32), form)
    return ScaledTensor(form, shape, codes, scales, tile=tile, offsets=offsets)  # type: ignore[arg-type]


# form, width, tile, offsets: groups of less than a chunk, of one, of several, whole rows; short chunks
CASES = [
    ("int4", 384, (1, 128), "zeros"),  # AWQ
    ("int4", 256, (1, 32), ""),  # GPTQ with groups of 32, Q4_0
    ("int4", 384, (1, 128), "any"),
    ("int4", 256, (1, 64), "zeros"),
    ("int4", 256, (1, 32), "any"),  # Q4_K
    ("int4", 512, (1, 256), ""),
    ("int4", 256, (1, 256), "any"),
    ("int4", 96, (1, 32), "any"),
    ("int8", 160, (1, 32), ""),  # Q8_0
    ("int8", 256, (1, 16), "any"),
    ("int8", 208, (1, 208), ""),  # compressed-tensors, a scale for each output
    ("float8_e4m3fn", 192, (1, 192), ""),
    ("float8_e4m3fn", 320, (128, 128), ""),  # DeepSeek
    ("float8_e4m3fn", 128, (150, 128), ""),
]


@pytest.mark.parametrize(("form", "width", "tile", "offsets_are"), CASES)
def test_a_matrix_holds_the_numbers_of_its_tensor(form: str, width: int, tile: tuple, offsets_are: str) -> None:
    """Also as rows by number, and on the way back to the host."""
    tensor = make(form, (11, width), tile, offsets_are=offsets_are)
    assert can_hold(tensor)
    matrix = place_codes(tensor, PLACE)
    expected = torch.from_numpy(tensor.to_float32())
    bound = {"rtol": 1e-3, "atol": 3e-4}  # offsets are rounded to float16
    torch.testing.assert_close(to_numbers(matrix, torch.float32).cpu(), expected, **bound)
    rows = torch.tensor([3, 10, 3], device=PLACE)
    torch.testing.assert_close(to_numbers(matrix, torch.float32, rows).cpu(), expected[rows.cpu()], **bound)
    back = codes_to_host(matrix.rows(2, 9))
    torch.testing.assert_close(torch.from_numpy(back.to_float32()), expected[2:9], **bound)
    again = place_codes(codes_to_host(matrix), PLACE)
    assert again.is_like(matrix)
    assert all(torch.equal(one, other) for one, other in zip(again.tensors(), matrix.tensors(), strict=True))


@pytest.mark.parametrize(("form", "width", "tile", "offsets_are"), CASES)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_products(form: str, width: int, tile: tuple, offsets_are: str, num_tokens: int) -> None:
    """One token and some take different ways; sums into a residual, biases, wide results."""
    tensor = make(form, (39, width), tile, offsets_are=offsets_are)
    device = CudaDevice(PLACE)
    matrix = device.place(tensor, form=tensor.format)
    assert isinstance(matrix, CodedMatrix)
    weight = torch.from_numpy(codes_to_host(matrix).to_float32()).to(PLACE)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((num_tokens, width), generator=generator).to(PLACE)
    bias = torch.randn(39, generator=generator).to(PLACE)
    linear = device.pack_linear([matrix], [bias])
    expected = F.linear(x, weight, bias)
    bound = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(linear(x), expected, **bound)
    residual = torch.randn((num_tokens, 39), generator=generator).to(PLACE)
    total = residual.clone()
    linear.add_to(total, x)
    torch.testing.assert_close(total, residual + expected, **bound)
    short = device.pack_linear([matrix])
    for dtype in (torch.float16, torch.bfloat16) if x.is_cuda else (torch.float16,):  # interpreted: no bfloat16
        half = x.to(dtype)
        wanted = F.linear(half.float(), weight)
        if suits_scaled_product(half, matrix, num_tokens):  # tokens are rounded to 3 bits
            assert (short.logits(half) - wanted).norm() < 0.05 * wanted.norm()
        else:
            torch.testing.assert_close(short.logits(half), wanted, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("num_tokens", [1, 5, 130])
def test_matrices_of_different_codes_are_one_layer(num_tokens: int) -> None:
    """As q, k and v of a file with K-quants are, or of a checkpoint with modules that are not quantised."""
    device = CudaDevice(PLACE)
    tensors = [make("int4", (32, 256), (1, 32)), make("int4", (16, 256), (1, 32)), make("int8", (16, 256), (1, 16))]
    plain = torch.randn((10, 256), generator=torch.Generator().manual_seed(2)).to(PLACE)
    weights = [*(device.place(tensor, form=tensor.format) for tensor in tensors), plain]
    linear = device.pack_linear(weights)
    numbers = [*(torch.from_numpy(tensor.to_float32()).to(PLACE) for tensor in tensors), plain]
    x = torch.randn((num_tokens, 256), generator=torch.Generator().manual_seed(3)).to(PLACE)
    torch.testing.assert_close(linear(x), F.linear(x, torch.cat(numbers)), rtol=2e-3, atol=2e-3)
    for (found, _), expected in zip(linear.unpack(), numbers, strict=True):
        host = device.to_host(found, max_rows=4)
        torch.testing.assert_close(torch.from_numpy(host.to_float32()), expected[:4].cpu(), rtol=1e-3, atol=1e-4)
    gated = device.pack_gated_linear(weights[2], weights[2])
    gate = F.linear(x, numbers[2])
    torch.testing.assert_close(gated(x), F.silu(gate) * gate, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", sorted(GGUF_FORMATS))
def test_blocks_of_gguf_are_taken_apart(name: str) -> None:
    """Against gguf's own reader; scales of K-quants are products that are rounded to float16."""
    form = gguf.GGMLQuantizationType[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[form]
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, size=(6, 512 // size, num_bytes)).astype(np.uint8)
    for at in {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q6_K": (208,)}.get(name, (0, 2)):
        data[:, :, at : at + 2] = rng.uniform(0.001, 0.01, size=(6, 512 // size, 1)).astype(np.float16).view(np.uint8)
    tensor = HostTensor(name, (6, 512), data.reshape(6, -1))
    device = CudaDevice(PLACE)
    matrix = device.place(tensor, form=name)
    assert isinstance(matrix, CodedMatrix)
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, form).astype(np.float32))
    found = to_numbers(matrix, torch.float32).cpu()
    assert (found - expected).abs().max() <= 2**-10 * expected.abs().max()
    ids = torch.tensor([5, 0], device=PLACE)
    torch.testing.assert_close(device.pack_linear([matrix]).embed(ids).cpu(), found[[5, 0]])
    shifted = device.pack_linear([matrix]).embed(ids, first_token=2).cpu()
    assert torch.equal(shifted, torch.stack((found[3], torch.zeros(512))))


@pytest.mark.parametrize(("group", "offsets_are"), [(128, "zeros"), (128, ""), (256, "any"), (64, "zeros"), (32, "")])
@pytest.mark.parametrize("num_tokens", [1, 12, 20, 40, 70])
def test_int4_tiles(group: int, offsets_are: str, num_tokens: int) -> None:
    """Every shape of tiles; blocks of outputs; inputs in several splits. On a card, its own instructions.

    With more than 64 tokens, numbers are rounded before they are multiplied.
    """
    matrix = place_codes(make("int4", (40, 1024), (1, group), offsets_are=offsets_are), PLACE)
    assert matrix.block == 8
    weight = to_numbers(matrix, torch.float32)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(2)).to(PLACE)
    for dtype in (torch.float16, torch.bfloat16) if PLACE.type == "cuda" else (torch.float16,):
        x = torch.randn((num_tokens, 1024), generator=torch.Generator().manual_seed(1)).to(PLACE).to(dtype)
        expected = F.linear(x.double(), weight.double(), bias.double()).float()
        found = torch.ones((num_tokens, 40), device=PLACE)
        int4_tiles(x, matrix, bias, found, adds=True)
        unit = torch.finfo(dtype).eps if num_tokens > 64 else 2**-18
        assert (found - 1 - expected).norm() <= unit * expected.norm()
        summed = int4_parts(x, matrix).sum(0) + bias
        assert (summed - expected).norm() <= unit * expected.norm()


def test_a_gate_adds_the_parts_of_its_product() -> None:
    """A product whose inputs are split is a sum that the gate's kernel makes."""
    weights = [place_codes(make("int4", (40, 1024), (1, 128), offsets_are="zeros"), PLACE) for _ in range(2)]
    gated = CudaDevice(PLACE).pack_gated_linear(*weights)
    for num_tokens in (1, 9):
        x = torch.randn((num_tokens, 1024), generator=torch.Generator().manual_seed(1)).to(PLACE).half()
        assert splits_int4(x, join(weights))
        gate = F.linear(x.float(), to_numbers(weights[0], torch.float32))
        found = gated(x)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), F.silu(gate) * gate, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("offsets_are", ["", "zeros", "any"])
def test_numbers_of_16_bits_are_rounded_once(offsets_are: str) -> None:
    matrix = place_codes(make("int4", (24, 1280), (1, 128), offsets_are=offsets_are), PLACE)
    exact = to_numbers(matrix, torch.float32)
    for dtype in (torch.float16, torch.bfloat16) if PLACE.type == "cuda" else (torch.float16,):
        found = to_numbers(matrix, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), rtol=0, atol=0)


def test_scales_of_4_bits_lie_beside_their_offsets() -> None:
    """The kernel loads both at once. Offsets of whole codes are zero points; others stay what they are."""
    whole, other = (place_codes(make("int4", (16, 512), (1, 128), offsets_are=are), PLACE) for are in ("zeros", "any"))
    assert whole.has_zeros and not other.has_zeros and not other.is_like(whole)
    for matrix in (whole, other, join([whole, whole])):
        assert matrix.offsets is not None and matrix.scales.stride() == (2, 2 * matrix.shape[0])
        assert matrix.offsets.data_ptr() == matrix.scales.data_ptr() + matrix.scales.element_size()
    wide = make("int4", (16, 512), (1, 128), offsets_are="zeros")
    wide.scales[0, 0], wide.offsets[0, 0] = 1e-9, 0  # type: ignore[index]
    matrix = place_codes(wide, PLACE)
    assert matrix.scales.dtype == torch.float32 and not matrix.has_zeros


def test_rows_of_blocks() -> None:
    """Views of whole blocks, into which new weights are copied; copies where a block is cut."""
    matrix = place_codes(make("int4", (40, 256), (1, 32), offsets_are="zeros"), PLACE)
    numbers = to_numbers(matrix, torch.float32)
    for start, stop in ((8, 24), (3, 17), (0, 4)):
        part = matrix.rows(start, stop)
        assert torch.equal(to_numbers(part, torch.float32), numbers[start:stop])
        is_view = part.codes.untyped_storage().data_ptr() == matrix.codes.untyped_storage().data_ptr()
        assert is_view == ((start, stop) == (8, 24))
    odd = place_codes(make("int4", (39, 256), (1, 32), offsets_are="zeros"), PLACE)
    assert odd.block == 1 and not odd.is_like(matrix), "rows of a layer that packs both would not be views"
    joined = join([matrix, matrix.rows(8, 24)])
    assert torch.equal(to_numbers(joined, torch.float32), torch.cat((numbers, numbers[8:24])))


def test_words_keep_every_code() -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 16, size=(5, 256)).astype(np.uint8))
    for words in (4, 16):
        packed = to_words(codes, words)
        assert torch.equal(of_words(packed, words), codes)
        numbers = packed.numpy().view(np.uint32)
        runs = codes[1, : 8 * words].reshape(4, 2 * words)
        assert [(int(numbers[1, 1]) >> (4 * i)) & 15 for i in range(8)] == [*runs[:, 2].tolist(), *runs[:, 3].tolist()]


def test_what_the_kernels_do_not_take() -> None:
    assert not can_hold(make("int4", (4, 48), (1, 48)))
    assert not can_hold(make("int4", (4, 192), (1, 24)))
    assert not can_hold(make("int8", (4, 40), (1, 40)))
    assert not can_hold(make("int8", (4, 64), (1, 8)))


def test_numbers_are_rounded_to_float8_by_output() -> None:
    weight = torch.randn((12, 64), generator=torch.Generator().manual_seed(0)).to(PLACE)
    weight[3] = 0
    matrix = round_to_float8(weight.to(torch.bfloat16))
    found = to_numbers(matrix, torch.float32)
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((found - weight).abs() <= weight.abs() * 2**-4 + largest * 2**-9).all(), "3 bits of mantissa"
    torch.testing.assert_close(found.abs().amax(dim=1, keepdim=True), largest, rtol=1e-2, atol=0)


def test_products_in_float8_units() -> None:
    """What Hopper multiplies in float8: PyTorch's product on a CPU takes the same operands."""
    weight = torch.randn((32, 64), generator=torch.Generator().manual_seed(0)).to(PLACE)
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(1)).to(PLACE).to(torch.bfloat16)
    x[2] = 0
    rounded = round_tokens(x, 64)
    codes, scales = rounded.codes, rounded.scales
    wanted = (x.float() / scales).to(torch.float8_e4m3fn)
    has_carry = (wanted.view(torch.uint8) & 7) == 0  # Triton's interpreter loses the carry into the exponent
    assert ((codes.view(torch.uint8) == wanted.view(torch.uint8)) | has_carry).all()
    torch.testing.assert_close(scales[:, 0], torch.where(x.any(dim=1), x.float().abs().amax(dim=1) / 448, 1.0))
    matrix = round_to_float8(weight)
    expected = F.linear(codes.float() * scales, to_numbers(matrix, torch.float32))
    product = torch.zeros((5, 32), device=PLACE)
    scaled_product(rounded, matrix, None, product, adds=False)
    torch.testing.assert_close(product, expected, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("num_tokens", [5, 140])
@pytest.mark.parametrize("group", [32, 256, 384])
def test_products_with_tokens_in_float8(group: int, num_tokens: int) -> None:
    """Scales of groups, of which the last may be short, or of whole tokens; sums that are split between programs."""
    tensor = make("float8_e4m3fn", (48, 384), (48, group))
    matrix = place_codes(tensor, PLACE)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((num_tokens, 384), generator=generator).to(PLACE).to(torch.bfloat16)
    bias = torch.randn(48, generator=generator).to(PLACE)
    found = round_tokens(x, group)
    codes, scales = found.codes, found.scales
    rounded = codes.float() * scales.repeat_interleave(group, dim=1)[:, :384]
    expected = F.linear(rounded, to_numbers(matrix, torch.float32), bias)
    residual = torch.randn((num_tokens, 48), generator=generator).to(PLACE)
    total = residual.clone()
    tiles(codes, matrix, bias, total, adds=True, token_scales=scales)
    torch.testing.assert_close(total, residual + expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
