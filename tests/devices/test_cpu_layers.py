"""The CPU's layers, native and PyTorch, against the definition in float32: the contract of devices/device.py."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from headwater.devices.cpu import CpuDevice
from headwater.devices.cpu_linear import TorchLinear
from headwater.devices.cpu_native import NativeLinear
from headwater.devices.native_library import native_library

pytestmark = pytest.mark.slow

KINDS = ["torch-float32", "torch-bfloat16", "native-bfloat16"]
Built = tuple[CpuDevice, torch.dtype]


@pytest.fixture(params=KINDS)
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    """A device and a dtype it computes in."""
    before = torch.get_num_threads()
    flavour, dtype = request.param.split("-")
    if flavour == "native" and native_library() is None:
        pytest.skip("native kernels are not built or not for this CPU")
    yield CpuDevice(use_native=flavour == "native"), getattr(torch, dtype)
    torch.set_num_threads(before)


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Up to the rounding of `dtype` relative to the largest value."""
    tolerance = (2e-2 if dtype == torch.bfloat16 else 1e-5) * float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 16, 25, 64])
@pytest.mark.parametrize(("num_in", "sizes"), [(64, (48, 16, 16)), (96, (33,)), (50, (7, 1))])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_x_w_plus_b(built: Built, rows: int, num_in: int, sizes: tuple[int, ...], has_bias: bool) -> None:
    """Each count of rows takes another tile, and odd sizes leave a block half filled."""
    device, dtype = built
    weights = [_random(size, num_in, dtype=dtype, scale=0.2, seed=i) for i, size in enumerate(sizes)]
    biases = [_random(size, dtype=dtype, seed=i) for i, size in enumerate(sizes)] if has_bias else None
    x = _random(rows, num_in, dtype=dtype, seed=5)
    bias = torch.cat(biases).float() if biases else None
    expected = F.linear(x.float(), torch.cat(weights).float(), bias)
    linear = device.pack_linear(weights, biases)
    assert (linear.in_features, linear.out_features) == (num_in, sum(sizes))
    found = linear(x)
    assert found.dtype == dtype
    _assert_close(found, expected, dtype)
    logits = linear.logits(x)
    assert logits.dtype == torch.float32
    _assert_close(logits, expected, dtype)
    residual = _random(rows, sum(sizes), dtype=torch.float32, seed=6)
    sum_before = residual.clone()
    linear.add_to(residual, x)
    _assert_close(residual, sum_before + expected, dtype)


@pytest.mark.parametrize("num_out", [16, 32, 40, 100])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 30])
def test_gated_linear_is_silu_gate_times_up(built: Built, num_out: int, has_bias: bool, rows: int) -> None:
    device, dtype = built
    gate, up = (_random(num_out, 64, dtype=dtype, scale=0.4, seed=seed) for seed in (1, 2))
    gate_bias, up_bias = (_random(num_out, dtype=dtype, seed=seed) for seed in (3, 4))
    biases = {"gate_bias": gate_bias, "up_bias": up_bias} if has_bias else {}
    x = _random(rows, 64, dtype=dtype, seed=7, scale=2.0)
    layer = device.pack_gated_linear(gate, up, **biases)
    left = F.linear(x.float(), gate.float(), gate_bias.float() if has_bias else None)
    right = F.linear(x.float(), up.float(), up_bias.float() if has_bias else None)
    _assert_close(layer(x), F.silu(left) * right, dtype)


def test_silu_of_large_numbers_is_finite() -> None:
    """exp(x) overflows above 88; gates of a real model do get that large."""
    if native_library() is None:
        pytest.skip("native kernels are not built or not for this CPU")
    gate = torch.zeros(32, 32, dtype=torch.bfloat16)
    gate[0, 0], gate[1, 0], gate[2, 0] = 500.0, -500.0, float("nan")
    up = torch.ones(32, 32, dtype=torch.bfloat16)
    layer = CpuDevice().pack_gated_linear(gate, up)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    found = layer(x)[0]
    assert found[0] == 500.0
    assert found[1].abs() < 1e-30
    assert found[2].isnan()


@pytest.mark.parametrize("sizes", [(48, 16, 16), (33,)])
def test_packed_parameters_come_back_bit_by_bit(built: Built, sizes: tuple[int, ...]) -> None:
    """Weight updates and checksums read parameters back out of the packed form."""
    device, dtype = built
    weights = [_random(size, 64, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    biases = [_random(size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    linear = device.pack_linear(weights, biases)
    weight, bias = linear.unpack()
    assert torch.equal(weight, torch.cat(weights))
    assert bias is not None
    assert torch.equal(bias, torch.cat(biases))
    ids = torch.tensor([0, sum(sizes) - 1, 31, 32, 5])
    assert torch.equal(linear.rows(ids), torch.cat(weights)[ids])
    gate, up = weights[0], _random(sizes[0], 64, dtype=dtype, seed=9)
    up_bias = _random(sizes[0], dtype=dtype, seed=10)
    unpacked = device.pack_gated_linear(gate, up, gate_bias=biases[0], up_bias=up_bias).unpack()
    for found, expected in zip(unpacked, (gate, up, biases[0], up_bias), strict=True):
        assert found is not None
        assert torch.equal(found, expected)
    assert device.pack_gated_linear(gate, up).unpack()[2:] == (None, None)


@pytest.mark.parametrize("size", [16, 24, 576])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_rms_norm(built: Built, size: int, rows: int) -> None:
    device, dtype = built
    x = _random(rows, size, dtype=torch.float32, scale=30.0)
    weight = _random(size, dtype=dtype)
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()
    found = device.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    _assert_close(found, expected, dtype)


def test_the_fast_path_is_the_one_in_use() -> None:
    """Falling back silently would pass every other test and be three times slower."""
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    native = CpuDevice().pack_linear([weight])
    plain = CpuDevice(use_native=False).pack_linear([weight])
    assert isinstance(native, NativeLinear if native_library() else TorchLinear)
    assert isinstance(plain, TorchLinear)
    assert plain.is_packed == torch.backends.mkldnn.is_available()
    assert isinstance(CpuDevice().pack_linear([weight.float()]), TorchLinear)
