"""The CPU's layers, native and PyTorch, against the definition in float32: the contract of devices/device.py."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from headwater.devices.cpu import linear as cpu_linear
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.linear import TorchLinear, can_pack
from headwater.devices.cpu.native_layers import NativeLinear
from headwater.devices.cpu.native_library import native_library
from headwater.devices.cpu.topology import cpu_flags

pytestmark = pytest.mark.slow

# `plain`: 16-bit weights that oneDNN does not pack, as on a lesser processor
KINDS = [
    "torch-float32", "torch-bfloat16", "torch-float16", "plain-bfloat16", "plain-float16", "native-bfloat16",
]  # fmt: skip
Built = tuple[CpuDevice, torch.dtype]


@pytest.fixture(params=KINDS)
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Built]:
    """A device and a dtype it computes in."""
    before = torch.get_num_threads()
    flavour, dtype = request.param.split("-")
    if flavour == "native" and native_library() is None:
        pytest.skip("native kernels are not built or not for this CPU")
    if flavour == "plain":
        monkeypatch.setattr(cpu_linear, "can_pack", lambda dtype: False)
    yield CpuDevice(use_native=flavour == "native"), getattr(torch, dtype)
    torch.set_num_threads(before)


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Up to the rounding of `dtype` relative to the largest value."""
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype] * float(expected.abs().max())
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


def test_a_weight_of_several_blocks_is_widened_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block is shorter than the others."""
    monkeypatch.setattr(cpu_linear, "can_pack", lambda dtype: False)
    monkeypatch.setattr(cpu_linear, "_WIDE_NUMBERS", 3 * 40)
    weight, bias = _random(10, 40, dtype=torch.bfloat16), _random(10, dtype=torch.bfloat16, seed=1)
    x = _random(5, 40, dtype=torch.bfloat16, seed=2)
    found = TorchLinear([weight], [bias]).logits(x)
    torch.testing.assert_close(found, F.linear(x.float(), weight.float(), bias.float()))


def test_the_fast_path_is_the_one_in_use() -> None:
    """Falling back silently would pass every other test and be three times slower."""
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    native = CpuDevice().pack_linear([weight])
    plain = CpuDevice(use_native=False).pack_linear([weight])
    assert isinstance(native, NativeLinear if native_library() else TorchLinear)
    assert isinstance(plain, TorchLinear)
    assert plain.is_packed == can_pack(torch.bfloat16)
    assert isinstance(CpuDevice().pack_linear([weight.float()]), TorchLinear)


@pytest.mark.skipif(
    not cpu_flags() >= {"avx512bw", "avx512vl", "avx512dq"} or "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="oneDNN packs bfloat16 with AVX512 alone",
)
def test_onednn_is_used_where_it_computes_bfloat16() -> None:
    """A probe that always says no would be slow and right."""
    assert can_pack(torch.bfloat16)


def _raises(*_: object) -> None:
    raise RuntimeError("this processor cannot\nand here is where")


@pytest.mark.parametrize(
    ("operator", "instead"),
    [
        ("_reorder_linear_weight", _raises),
        ("_linear_pointwise", _raises),
        ("_linear_pointwise", lambda x, w, *_: torch.zeros(len(x), 48)),
    ],
    ids=["no packing", "no product", "wrong product"],
)
def test_a_library_that_cannot_is_not_used(
    operator: str,
    instead: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """oneDNN refuses on processors without AVX512, and where the environment caps its instructions."""
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight: weight.to_mkldnn())
    monkeypatch.setattr(torch.ops.mkldnn, operator, instead)
    with caplog.at_level(logging.INFO):
        assert not can_pack.__wrapped__(torch.bfloat16)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("oneDNN does not compute bfloat16 here")
    assert "\n" not in caplog.messages[0]


def test_auto_is_bfloat16_only_where_something_computes_it_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag alone says nothing of a library whose instructions are capped."""
    monkeypatch.setattr("headwater.devices.cpu.device.has_fast_bfloat16", lambda: True)
    for can, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("headwater.devices.cpu.device.can_pack", lambda dtype, can=can: can)
        assert CpuDevice(use_native=False).auto_dtype() == expected
    monkeypatch.setattr("headwater.devices.cpu.device.has_fast_bfloat16", lambda: False)
    assert CpuDevice(use_native=False).auto_dtype() == "float32"


def test_the_native_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of other processors are tested on this one."""
    monkeypatch.setenv("HEADWATER_NATIVE", "0")
    assert native_library.__wrapped__() is None
