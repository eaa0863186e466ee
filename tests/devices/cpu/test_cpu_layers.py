"""The CPU's layers, with kernels and in numpy, against the definition: the contract of devices/device.py."""

from functools import partial

import numpy as np
import pytest
from linear_setting import weight as random_weight
from program_steps import step_of

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import SELECTED, KernelLibrary, usable_kernels
from headwater.devices.cpu.linear_kernels import QuantizeJob
from headwater.devices.cpu.packed_layers import PackedGatedLinear, PackedLinear, fuse_activations
from headwater.devices.cpu.plain_layers import PlainLinear
from headwater.devices.cpu.program import Array, Program, StepArrays
from headwater.devices.cpu.row_ops import argmax, rms_norm, select_rows
from headwater.devices.cpu.topology import num_usable_cores
from headwater.devices.host_tensor import HostTensor

FORMATS = ("float32", "bfloat16", "float16")
HIDDEN, INNER = 512, 768
Floats = np.ndarray


@pytest.fixture(params=["kernels", "plain"])
def device(request: pytest.FixtureRequest) -> CpuDevice:
    if request.param == "kernels" and usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    return CpuDevice(num_threads=2, use_kernels=request.param == "kernels")


def _random(*shape: int, form: str = "float32", scale: float = 1.0, seed: int = 0) -> HostTensor:
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return HostTensor.of(values).astype(form)


def _input(device: CpuDevice, x: Floats) -> Array:
    """An array that holds `x`: the rows of an embedding."""
    return device.pack_linear([HostTensor.of(x)]).embed(device.start_program().token_ids)


def _numbers(y: Array, step: StepArrays) -> Floats:
    y.program.keep(y)
    y.program.run(step)
    return y.program.view(y, step).copy()


def _close(found: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(("num_in", "sizes"), [(64, (48, 16, 16)), (96, (33,)), (50, (7, 1))])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_x_w_plus_b(
    device: CpuDevice, form: str, rows: int, num_in: int, sizes: tuple[int, ...], has_bias: bool
) -> None:
    weights = [_random(size, num_in, form=form, scale=0.2, seed=i) for i, size in enumerate(sizes)]
    biases = [_random(size, form=form, seed=i) for i, size in enumerate(sizes)] if has_bias else None
    x = _random(rows, num_in, seed=5).data
    expected = x @ np.concatenate([weight.to_float32() for weight in weights]).T
    if biases:
        expected += np.concatenate([bias.to_float32() for bias in biases])
    linear = device.pack_linear(weights, biases)
    assert (linear.in_features, linear.out_features) == (num_in, sum(sizes))
    _close(_numbers(linear(_input(device, x)), step_of(rows)), expected)
    residual = _random(rows, sum(sizes), seed=6).data
    wide = _input(device, np.concatenate((x, residual), axis=1))
    # the residual and x out of one embedding: products with a unit matrix
    units = np.eye(num_in + sum(sizes), dtype=np.float32)
    of_x, of_residual = (device.pack_linear([HostTensor.of(it)])(wide) for it in (units[:num_in], units[num_in:]))
    linear.add_to(of_residual, of_x)
    _close(_numbers(of_residual, step_of(rows)), residual + expected)


@pytest.mark.parametrize("formats", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "bfloat16", "Q4_1")])
def test_layers_of_several_formats_fill_one_array(formats: tuple[str, ...]) -> None:
    """GGUF files keep queries, keys and values in formats of their own."""
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    weights = [random_weight(form, (32, 256), seed=i) for i, form in enumerate(formats)]
    x = _random(9, 256, seed=3).data
    linear = CpuDevice(num_threads=2).pack_linear(weights)
    found = _numbers(linear(_input(CpuDevice(), x)), step_of(9))
    expected = x @ np.concatenate([weight.to_float32() for weight in weights]).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * float(np.abs(expected).max()))
    for weight, (unpacked, bias) in zip(weights, linear.unpack(), strict=True):
        assert np.array_equal(unpacked.to_float32(), weight.to_float32())
        assert bias is None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_out", [16, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_linear_is_silu_gate_times_up(device: CpuDevice, form: str, num_out: int, has_bias: bool) -> None:
    gate, up = (_random(num_out, 64, form=form, scale=0.4, seed=seed) for seed in (1, 2))
    gate_bias, up_bias = (_random(num_out, form=form, seed=seed) if has_bias else None for seed in (3, 4))
    x = _random(11, 64, seed=7, scale=2.0).data
    left, right = x @ gate.to_float32().T, x @ up.to_float32().T
    if gate_bias is not None and up_bias is not None:
        left, right = left + gate_bias.to_float32(), right + up_bias.to_float32()
    layer = device.pack_gated_linear(gate, up, gate_bias=gate_bias, up_bias=up_bias)
    _close(_numbers(layer(_input(device, x)), step_of(11)), left / (1 + np.exp(-left)) * right)


def test_silu_of_large_numbers_is_finite(device: CpuDevice) -> None:
    """exp(x) overflows above 88; gates of a real model do get that large."""
    gate = np.zeros((32, 32), dtype=np.float32)
    gate[:3, 0] = 500.0, -500.0, np.nan
    layer = device.pack_gated_linear(HostTensor.of(gate), HostTensor.of(np.ones((32, 32), dtype=np.float32)))
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, 0] = 1.0
    found = _numbers(layer(_input(device, x)), step_of(1))[0]
    assert found[0] == 500.0
    assert abs(found[1]) < 1e-30
    assert np.isnan(found[2])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", [(48, 16, 16), (33, 5)])
def test_packed_parameters_come_back_bit_by_bit(device: CpuDevice, form: str, sizes: tuple[int, ...]) -> None:
    """Weight updates and checksums read parameters back out of the packed form."""
    weights = [_random(size, 64, form=form, seed=i) for i, size in enumerate(sizes)]
    biases = [_random(size, form=form, seed=i) for i, size in enumerate(sizes)]
    parts = list(zip(weights, biases, strict=True))
    up, up_bias = _random(sizes[0], 64, form=form, seed=9), _random(sizes[0], form=form, seed=10)
    gated = device.pack_gated_linear(weights[0], up, gate_bias=biases[0], up_bias=up_bias)
    for packed, expected in (
        (device.pack_linear(weights, biases), parts),
        (device.pack_linear(weights), [(weight, None) for weight in weights]),
        (gated, [parts[0], (up, up_bias)]),
    ):
        for found, given in zip(packed.unpack(), expected, strict=True):
            for one, other in zip(found, given, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert one.format == other.format
                    assert np.array_equal(one.data, other.data)


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_an_embedding_are_its_values(device: CpuDevice, form: str) -> None:
    weight = _random(33, 24, form=form)
    y = device.pack_linear([weight]).embed(device.start_program().token_ids)
    assert np.array_equal(_numbers(y, step_of(33)), weight.to_float32())


def test_tokens_of_other_ranks_have_an_embedding_of_zeros(device: CpuDevice) -> None:
    """They are added up over ranks: rows of a wrong token, or what was in memory, would change the text."""
    weight = _random(10, 24)
    y = device.pack_linear([weight]).embed(device.start_program().token_ids, first_token=4)
    expected = np.zeros((33, 24), dtype=np.float32)
    expected[4:14] = weight.to_float32()
    assert np.array_equal(_numbers(y, step_of(33)), expected)


@pytest.mark.parametrize("size", [16, 24, 576])
def test_rms_norm(device: CpuDevice, size: int) -> None:
    x, weight = _random(9, size, scale=30.0).data, _random(size, form="bfloat16")
    expected = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight.to_float32()
    _close(_numbers(device.rms_norm(_input(device, x), weight, 1e-5), step_of(9)), expected)


def test_the_most_probable_token_of_selected_rows(device: CpuDevice) -> None:
    x = _random(9, 50).data
    x[4, 7] = np.inf
    tokens, logits, is_finite = (_kept(it) for it in argmax(select_rows(_input(device, x))))
    step = step_of(9, selected=(8, 4, 0))
    tokens.program.run(step)
    assert tokens.rows == SELECTED
    assert tokens.program.view(tokens, step)[:, 0].tolist() == [x[8].argmax(), 7, x[0].argmax()]
    assert tokens.program.view(logits, step)[:, 0].tolist() == [x[8].max(), np.inf, x[0].max()]
    assert tokens.program.view(is_finite, step)[:, 0].tolist() == [1, 0, 1]


def _kept(array: Array) -> Array:
    return array.program.keep(array)


def test_the_fast_path_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falling back silently would pass every other test and be a hundred times slower."""
    weight = _random(32, 32)
    kind = PackedLinear if usable_kernels() else PlainLinear
    assert isinstance(CpuDevice().pack_linear([weight]), kind)
    assert isinstance(CpuDevice(use_kernels=False).pack_linear([weight]), PlainLinear)
    assert CpuDevice(use_kernels=False).auto_dtype() == "float32"
    assert CpuDevice().auto_dtype() == ("bfloat16" if usable_kernels() else "float32")
    monkeypatch.setenv("HEADWATER_NATIVE", "0")
    assert isinstance(CpuDevice().pack_linear([weight]), PlainLinear)


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="num_threads must be at least 1, found 0"):
        CpuDevice(num_threads=0)


@pytest.mark.parametrize("num_threads", [1, 2, 5, 4 * num_usable_cores() + 1])
def test_threads_do_not_change_a_bit(num_threads: int) -> None:
    """Work is cut by outputs and rows, never within a sum."""
    results = []
    for threads in (1, num_threads):
        device = CpuDevice(num_threads=threads)
        x = _input(device, _random(37, 64).data)
        results.append(_numbers(device.pack_linear([_random(200, 64, form="bfloat16")])(x), step_of(37)))
    assert np.array_equal(results[0], results[1])


def test_time_is_counted_for_each_op() -> None:
    """The profile of a step names its slow ops."""
    device = CpuDevice(num_threads=2)
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    y = device.pack_linear([_random(64, 64)])(_input(device, _random(30, 64).data))
    program: Program = y.program
    program.run(step_of(30))
    assert not program.op_ns.any()
    program.is_timed = True
    program.run(step_of(30))
    assert [op.kernel for op in program.ops] == ["embed", "linear"]
    assert (program.op_ns > 0).all()


def _record_mlp(library: KernelLibrary, format: str) -> tuple[Program, Array]:
    """An MLP behind a norm: embedding, norm, gate and up, down."""
    program = Program(library, num_threads=2)
    gate, up = (random_weight(format, (INNER, HIDDEN), seed) for seed in (1, 2))
    pack = partial(PackedLinear.of, library, num_threads=1)
    hidden = pack([random_weight("float32", (60, HIDDEN), 3)]).embed(program.token_ids)
    x = rms_norm(hidden, HostTensor.of(np.linspace(1, 9, HIDDEN, dtype=np.float32)), 1e-5)
    gated = PackedGatedLinear.of(library, gate, up, gate_bias=None, up_bias=None, num_threads=1)
    return program, program.keep(pack([random_weight(format, (HIDDEN, INNER), 4)])(gated(x)))


def _steps_of_tiles() -> list[StepArrays]:
    steps = [step_of(50), step_of(50), step_of(1)]
    steps[1].__dict__["num_decodes"] = 19
    return steps


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("format", ["Q4_1", "Q8_0", "bfloat16"])
def test_activations_of_tiles_are_the_same_bits_without_a_detour(emulated: KernelLibrary, format: str) -> None:
    """Prompts alone, beside decodes, and of one row."""
    plain, expected = _record_mlp(emulated, format)
    fused, found = _record_mlp(emulated, format)
    fused.rewrite(fuse_activations)
    writers = [op for op in fused.ops if "activations" in op.arrays]
    assert [op.kernel for op in writers] == ["rms_norm", "linear"]
    for step in _steps_of_tiles():
        plain.run(step)
        fused.run(step)
        np.testing.assert_array_equal(fused.view(found, step), plain.view(expected, step))
    assert [op.job.only_decodes for op in fused.ops if isinstance(op.job, QuantizeJob)] == [1, 1]


@pytest.mark.emulated
@pytest.mark.slow
def test_numbers_of_tiles_that_others_read_are_written_as_well(emulated: KernelLibrary) -> None:
    """A second reader that is no product: all stays as it was."""
    program = Program(emulated, num_threads=1)
    x = PackedLinear.of(emulated, [random_weight("float32", (60, 64))], num_threads=1).embed(program.token_ids)
    normed = rms_norm(x, HostTensor.of(np.ones(64, np.float32)), 1e-5)
    PackedLinear.of(emulated, [random_weight("Q4_1", (32, 64))], num_threads=1)(normed)
    rms_norm(normed, HostTensor.of(np.ones(64, np.float32)), 1e-5)
    before = program.ops
    program.rewrite(fuse_activations)
    assert program.ops == before
