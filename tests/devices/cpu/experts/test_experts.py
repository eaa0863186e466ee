"""A layer of experts on the CPU, with kernels and in numpy, against a definition token by token."""

import math
from pathlib import Path

import numpy as np
import pytest
import sanitized
from gguf import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantise
from linear_setting import BITS_OF_ACTIVATIONS, values_of, weight
from program_steps import step_of

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_build import usable_instruction_sets
from headwater.devices.cpu.kernel_library import KernelLibrary, usable_kernels
from headwater.devices.cpu.plain.experts import route
from headwater.devices.cpu.plain.linear import quantized, silu
from headwater.devices.cpu.program import Program
from headwater.devices.device import Activation, Experts, Routing
from headwater.devices.host_tensor import HostTensor
from headwater.devices.quantise import quantise

HIDDEN, INNER, NUM_EXPERTS, PER_TOKEN = 64, 40, 6, 3
Floats = np.ndarray
Expert = tuple[HostTensor, HostTensor, HostTensor]


def device_of(library: KernelLibrary | None) -> CpuDevice:
    device = CpuDevice(num_threads=2, use_kernels=False)
    device._library = library
    return device


@pytest.fixture(params=["kernels", "plain"])
def device(request: pytest.FixtureRequest) -> CpuDevice:
    if request.param == "plain":
        return device_of(None)
    if sanitized.LIBRARY:
        return device_of(KernelLibrary(Path(sanitized.LIBRARY), usable_instruction_sets()[-1]))
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    return device_of(usable_kernels())


def experts_of(format: str, *, hidden: int = HIDDEN, inner: int = INNER, num: int = NUM_EXPERTS) -> list[Expert]:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [
        tuple(weight(format, shape, seed=10 * expert + which) for which, shape in enumerate(shapes))
        for expert in range(num)
    ]  # type: ignore[misc]


def pack(
    device: CpuDevice,
    experts: list[Expert],
    *,
    per_token: int = PER_TOKEN,
    renormalises: bool = True,
    biases: list[Expert] | None = None,
    activation: Activation = "silu",
) -> Experts:
    routing = Routing(per_token, renormalises)
    return device.pack_experts(
        iter(experts), num_experts=len(experts), routing=routing, biases=biases, activation=activation
    )


def biases_of(format: str = "float32", *, hidden: int = HIDDEN, inner: int = INNER) -> list[Expert]:
    random = np.random.default_rng(12)

    def one(size: int) -> HostTensor:
        return HostTensor.of(random.normal(size=size).astype(np.float32)).astype(format)

    return [(one(inner), one(inner), one(hidden)) for _ in range(NUM_EXPERTS)]


def run(device: CpuDevice, layer: Experts, x: Floats, logits: Floats, *, residual: Floats | None = None) -> Floats:
    """The layer's result for rows of an embedding, or what `add_to` makes of the residual."""
    program: Program = device.start_program()
    arrays = [
        device.pack_linear([HostTensor.of(np.ascontiguousarray(it))]).embed(program.token_ids)
        for it in (x, logits, x if residual is None else residual)
    ]
    if residual is None:
        y = layer(arrays[0], arrays[1])
    else:
        layer.add_to(arrays[2], arrays[0], arrays[1])
        y = arrays[2]
    program.keep(y)
    device.finish_program(program)
    step = step_of(len(x))
    program.run(step)
    return program.view(y, step).copy()


def defined(
    x: Floats,
    logits: Floats,
    experts: list[Expert],
    *,
    per_token: int,
    renormalises: bool,
    biases: list[Expert] | None = None,
) -> Floats:
    """Token by token, in float64; with biases, those of gpt-oss."""
    y = np.zeros((len(x), x.shape[1]))
    values = [[values_of(each).astype(np.float64) for each in expert] for expert in experts]
    added = None if biases is None else [[values_of(each).astype(np.float64) for each in expert] for expert in biases]
    for token, row in enumerate(logits.astype(np.float64)):
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))[:per_token]
        shares = np.exp(row - row.max())
        shares /= shares[order].sum() if renormalises else shares.sum()
        for expert in order:
            gate, up, down = values[expert]
            left = gate @ x[token]
            if added is not None:
                right = up @ x[token]
                left, right = np.minimum(left + added[expert][0], 7), (right + added[expert][1]).clip(-7, 7)
                inner = left / (1 + np.exp(-1.702 * left)) * (right + 1)
                y[token] += shares[expert] * (down @ inner + added[expert][2])
                continue
            y[token] += shares[expert] * (down @ (left / (1 + np.exp(-left)) * (up @ x[token])))
    return y


def inputs(rows: int, *, hidden: int = HIDDEN, num: int = NUM_EXPERTS, seed: int = 3) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, hidden), dtype=np.float32) * np.float32(2)
    return x, random.standard_normal((rows, num), dtype=np.float32)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 5, 230])
@pytest.mark.parametrize("renormalises", [True, False])
def test_a_token_goes_through_its_experts(device: CpuDevice, format: str, rows: int, renormalises: bool) -> None:
    experts = experts_of(format)
    layer = pack(device, experts, renormalises=renormalises)
    x, logits = inputs(rows)
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=renormalises)
    np.testing.assert_allclose(run(device, layer, x, logits), expected, atol=2e-5 * np.abs(expected).max())
    residual = inputs(rows, seed=8)[0]
    found = run(device, layer, x, logits, residual=residual)
    np.testing.assert_allclose(found, residual + expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 70])
def test_experts_with_biases_and_the_clamped_activation(device: CpuDevice, format: str, rows: int) -> None:
    """Numbers reach both limits; a lost or another expert's bias, or a lost clamp, is far off."""
    experts, biases = experts_of(format), biases_of(format)
    layer = pack(device, experts, biases=biases, activation="clamped_swiglu")
    x, logits = inputs(rows)
    x *= 12
    gate, up = values_of(experts[0][0]) @ x[0], values_of(experts[0][1]) @ x[0]
    assert rows == 1 or (gate.max() > 8 and up.max() > 8 and up.min() < -8)
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=True, biases=biases)
    np.testing.assert_allclose(run(device, layer, x, logits), expected, atol=2e-5 * np.abs(expected).max())
    for number, given in enumerate(biases):
        for which in range(3):
            assert np.array_equal(layer.bias(number, which).data, given[which].data)


def test_equal_logits_go_to_the_lower_numbers(device: CpuDevice) -> None:
    """Two devices that break ties by chance would write other text for the same prompt."""
    experts = experts_of("float32")
    x, logits = inputs(4)
    logits[0] = 1.5
    logits[1] = [0, 2, 2, 2, 2, 0]
    logits[2] = [-math.inf, -math.inf, 1, -math.inf, -math.inf, -math.inf]
    logits[3] = [-0.0, 0.0, -0.0, 1, 0.0, 0.0]
    chosen, weights = route(logits, PER_TOKEN, renormalises=True)
    assert chosen.tolist() == [[0, 1, 2], [1, 2, 3], [2, 0, 1], [3, 0, 1]]
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=True)
    np.testing.assert_allclose(run(device, pack(device, experts), x, logits), expected, atol=1e-5)


@pytest.mark.parametrize("favourite", [0, NUM_EXPERTS - 1])
@pytest.mark.parametrize("rows", [1, 96, 97, 250])
def test_all_rows_may_go_to_one_expert(device: CpuDevice, favourite: int, rows: int) -> None:
    """The others get no row; tiles of the one are full, or one row longer."""
    experts = experts_of("float32")
    x, logits = inputs(rows)
    logits[:, favourite] = 30
    expected = defined(x, logits, experts, per_token=1, renormalises=True)
    layer = pack(device, experts, per_token=1)
    np.testing.assert_allclose(run(device, layer, x, logits), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("num", [1, 7])
def test_every_expert_may_be_chosen(device: CpuDevice, num: int) -> None:
    experts = experts_of("float32", num=num)
    x, logits = inputs(9, num=num)
    expected = defined(x, logits, experts, per_token=num, renormalises=False)
    layer = pack(device, experts, per_token=num, renormalises=False)
    np.testing.assert_allclose(run(device, layer, x, logits), expected, atol=2e-5 * np.abs(expected).max())


def test_a_row_that_is_not_finite_harms_no_other(device: CpuDevice) -> None:
    """A NaN among the logits must lead to an expert that exists; the row's own result is NaN, which is reported."""
    experts = experts_of("float32")
    x, logits = inputs(6)
    layer = pack(device, experts)
    expected = run(device, layer, x, logits)
    x[2], logits[2] = np.nan, np.nan
    logits[4, 0] = np.inf
    found = run(device, layer, x, logits)
    assert np.isnan(found[2]).all() and np.isnan(found[4]).all()
    kept = [0, 1, 3, 5]
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "Q8_0", "Q4_0", "Q4_K", "MXFP4"])
def test_a_rows_bits_depend_on_no_other_row(library: KernelLibrary, format: str) -> None:
    """Else a chunk, a batch or a hit of the cache would change the text."""
    device = device_of(library)
    hidden, inner = (256, 256) if format.endswith("K") else (HIDDEN, 64)
    layer = pack(device, experts_of(format, hidden=hidden, inner=inner))
    x, logits = inputs(200, hidden=hidden)
    logits[60:, 1] = 20  # most rows in one expert, of several tiles
    whole = run(device, layer, x, logits)
    for rows in (slice(0, 1), slice(3, 10), slice(70, 71), slice(40, 199)):
        assert np.array_equal(run(device, layer, x[rows], logits[rows]), whole[rows])


@pytest.mark.emulated
@pytest.mark.parametrize("format", ["bfloat16", "Q8_0", "Q4_0"])
def test_experts_of_prompts_are_multiplied_in_registers(emulated: KernelLibrary, format: str) -> None:
    """Where AMX multiplies the prompts of other layers, whose activations are others."""
    device, x, logits = device_of(emulated), *inputs(40)
    experts = experts_of(format, inner=96)
    found = run(device, pack(device, experts), x, logits)
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=True)
    bound = {"bfloat16": 2e-5, "Q8_0": 1e-3, "Q4_0": 3e-2}[format]
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "MXFP4"])
def test_quantised_experts_are_those_of_the_dequantised_weights(library: KernelLibrary, form: str) -> None:
    """With activations rounded as for every product of this format, and nothing else."""
    device = device_of(library)
    plain = experts_of("float32", inner=96)
    quantised: list[Expert] = [tuple(_in_blocks(each, form) for each in expert) for expert in plain]  # type: ignore[misc]
    x, logits = inputs(33)
    found = run(device, pack(device, quantised), x, logits)
    rounded, chosen = quantized(x, BITS_OF_ACTIVATIONS[form]), route(logits, PER_TOKEN, renormalises=True)
    expected = np.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(*chosen, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up, down = (values_of(each) for each in quantised[expert])
            inner = silu(rounded[token, None] @ gate.T) * (rounded[token, None] @ up.T)
            expected[token] += share * (quantized(inner, BITS_OF_ACTIVATIONS[form]) @ down.T)[0]
    bound = 1e-4 if form == "Q8_0" else 2e-2  # a sum that is rounded to the next integer moves one activation
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())
    exact = defined(x, logits, plain, per_token=PER_TOKEN, renormalises=True)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < {"Q8_0": 0.02, "Q4_0": 0.2, "MXFP4": 0.3}[form]


def _in_blocks(values: HostTensor, form: str) -> HostTensor:
    if form != "MXFP4":
        return quantise(values, form)
    return HostTensor(form, values.shape, gguf_quantise(values.data, GGMLQuantizationType.MXFP4))


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_matrices_come_back_bit_by_bit(device: CpuDevice, format: str) -> None:
    """Weight updates and checksums read parameters back out of the packed form."""
    experts = experts_of(format)
    layer = pack(device, experts)
    for number, expert in enumerate(experts):
        for which, given in enumerate(expert):
            found = layer.matrix(number, which)
            assert found.format == given.format and np.array_equal(found.data, given.data)


def test_experts_of_two_formats_are_refused(library: KernelLibrary) -> None:
    experts = experts_of("float32")
    experts[2] = experts_of("bfloat16")[2]
    with pytest.raises(ValueError, match="the experts of a layer have one format and shape"):
        pack(device_of(library), experts)
