"""Products with packed weights of every format, against numpy, on every instruction set that this CPU runs."""

import numpy as np
import pytest
import sanitized
from linear_setting import (
    BITS_OF_ACTIVATIONS,
    BLOCKS,
    GROUP_OF,
    aligned,
    multiply,
    quantize_rows,
    step_of,
    uses_tiles,
    values_of,
    weight,
)

from headwater.devices.cpu.kernel_build import build
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.linear_kernels import EmbedJob, Mode
from headwater.devices.cpu.packed_weights import FORMATS, pack, pack_gated, unpack
from headwater.devices.cpu.plain import linear as plain
from headwater.devices.host_tensor import HostTensor

pytestmark = pytest.mark.slow  # 4 s for each instruction set
every_format = pytest.mark.parametrize("format", FORMATS)
MOST_ROWS = 130 if sanitized.LIBRARY else 512


def activations(rows: int, in_features: int) -> np.ndarray:
    """Numbers of very different sizes, as behind a norm."""
    rng = np.random.default_rng(rows)
    return (rng.normal(size=(rows, in_features)) * rng.lognormal(size=in_features)).astype(np.float32)


def seen(library: KernelLibrary, x: np.ndarray, format: str) -> np.ndarray:
    """The activations after their quantisation, if the format quantises them."""
    is_float = format not in BITS_OF_ACTIVATIONS or uses_tiles(library, format)
    return x if is_float else plain.quantized(x, BITS_OF_ACTIVATIONS[format])


def error_of(library: KernelLibrary, format: str) -> float:
    """The error of a product, relative to its size. numpy has no tiles, whose factors are bfloat16."""
    if not uses_tiles(library, format):
        return 2e-6
    return 2**-16 if format == "bfloat16" else 5 * 2**-9


def assert_close(
    found: np.ndarray, expected: np.ndarray, x: np.ndarray, matrix: np.ndarray, *, error: float = 2e-6
) -> None:
    """To rounding errors: relative to the sum of the sizes of all products."""
    bound = error * (np.abs(x) @ np.abs(matrix).T) + 1.2e-7 * np.abs(expected) + 1e-6
    assert (np.abs(found - expected) <= bound).all(), np.abs((found - expected) / bound).max()


@every_format
@pytest.mark.parametrize("rows", [1, 5, 16, 17] if sanitized.LIBRARY else [1, 2, 3, 5, 7, 16, 17, 100])
def test_a_product_is_right(library: KernelLibrary, format: str, rows: int) -> None:
    in_features = GROUP_OF[format] * (3 if GROUP_OF[format] > 2 else 31)
    tensor, x = weight(format, (72, in_features)), activations(rows, in_features)
    packed, matrix = pack(library, [tensor]), values_of(tensor)
    wide, x = matrix.astype(np.float64), seen(library, x, format)
    found = multiply(library, packed, activations(rows, in_features))
    assert_close(found, x @ wide.T, x, wide, error=error_of(library, format))


@every_format
@pytest.mark.parametrize("shape", [(1, 1), (15, 2), (17, 3), (33, 1), (160, 5)])
def test_odd_shapes_are_right(library: KernelLibrary, format: str, shape: tuple[int, int]) -> None:
    """Outputs that do not fill a block: nothing is written beside them."""
    out_features, in_features = shape[0], shape[1] * GROUP_OF[format]
    tensor = weight(format, (out_features, in_features))
    x, bias = activations(4, in_features), np.arange(out_features, dtype=np.float32)
    packed = pack(library, [tensor], [bias])
    y = np.full((4, out_features + 3), 7, np.float32)
    found = multiply(library, packed, x, y=y)
    wide, x = values_of(tensor).astype(np.float64), seen(library, x, format)
    assert_close(found[:, :out_features], x @ wide.T + bias, x, wide, error=error_of(library, format))
    assert (y[:, out_features:] == 7).all()


@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("in_features", [1, 3, 31, 257])
def test_plain_weights_take_any_number_of_inputs(library: KernelLibrary, format: str, in_features: int) -> None:
    tensor, x = weight(format, (20, in_features)), activations(9, in_features)
    wide = values_of(tensor).astype(np.float64)
    found = multiply(library, pack(library, [tensor]), x)
    assert_close(found, x @ wide.T, x, wide, error=error_of(library, format))


@every_format
def test_a_row_depends_neither_on_its_neighbours_nor_on_chunks(library: KernelLibrary, format: str) -> None:
    """Bit for bit: else a request's text would depend on who else is served."""
    in_features = 512 + GROUP_OF[format] * (256 // GROUP_OF[format])
    packed, x = pack(library, [weight(format, (208, in_features))]), activations(MOST_ROWS, in_features)
    alone = np.concatenate([multiply(library, packed, x[i : i + 1]) for i in range(20)])
    for rows in (2, 3, 4, 6, 7, 16, 17, 97, MOST_ROWS):
        np.testing.assert_array_equal(multiply(library, packed, x[:rows])[:20], alone[:rows])
    np.testing.assert_array_equal(multiply(library, packed, x[3:20]), alone[3:])


@every_format
def test_chunks_may_run_in_any_order_and_each_is_needed(library: KernelLibrary, format: str) -> None:
    packed, x = pack(library, [weight(format, (1000, 256))]), activations(97, 256)
    whole = multiply(library, packed, x)
    y = np.full_like(whole, np.nan)
    order, before = [], 0
    while np.isnan(y).any():  # from the last chunk to the first
        before += 1
        order = [before - 1, *order]
        y = multiply(library, packed, x, chunks=[before - 1], y=y)
        assert before < 10_000
    assert before > 4
    np.testing.assert_array_equal(multiply(library, packed, x, chunks=order), whole)


@every_format
def test_a_product_is_added_to_the_residual(library: KernelLibrary, format: str) -> None:
    packed, x = pack(library, [weight(format, (40, 256))]), activations(5, 256)
    residual = activations(5, 40)
    expected = residual + multiply(library, packed, x)
    np.testing.assert_array_equal(multiply(library, packed, x, mode=Mode.ADD, y=residual.copy()), expected)


@every_format
@pytest.mark.parametrize("out_features", [16, 24, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gate_and_up(library: KernelLibrary, format: str, out_features: int, has_bias: bool) -> None:
    gate, up = (weight(format, (out_features, 256), seed) for seed in (1, 2))
    biases = [np.linspace(-1, 1, out_features, dtype=np.float32) * i for i in (1, 2)] if has_bias else None
    packed, x = pack_gated(library, [gate, up], biases), activations(18, 256)
    expected = plain.gated_linear(seen(library, x, format), values_of(gate), values_of(up), *(biases or ()))
    atol = 0.02 * np.abs(expected).max() if uses_tiles(library, format) else 2e-5
    np.testing.assert_allclose(multiply(library, packed, x), expected, rtol=2e-3, atol=atol)


def test_silu_of_extreme_numbers_is_finite(library: KernelLibrary) -> None:
    x = np.array([[-1e4], [-100], [-88], [-0.0], [0.1], [100], [1e4], [np.nan]], np.float32)
    one = HostTensor.of(np.ones((1, 1), np.float32))
    with np.errstate(over="ignore"):
        expected = plain.silu(x) * x
    np.testing.assert_allclose(multiply(library, pack_gated(library, [one, one]), x), expected, rtol=1e-5, atol=1e-30)


@every_format
def test_several_matrices_become_one(library: KernelLibrary, format: str) -> None:
    """Queries, keys and values: also where a part does not fill its last block."""
    for sizes in ((32, 16, 16), (40, 8, 8)):
        parts = [weight(format, (size, 256), seed) for seed, size in enumerate(sizes)]
        matrix = np.concatenate([values_of(part) for part in parts])
        np.testing.assert_array_equal(unpack(library, pack(library, parts))[0], matrix)


@every_format
def test_packed_weights_are_the_files_values(library: KernelLibrary, format: str) -> None:
    """Bit for bit what gguf's reader makes of the file: no detour through 16 bits."""
    tensor = weight(format, (50, 512))
    np.testing.assert_array_equal(unpack(library, pack(library, [tensor]))[0], values_of(tensor))
    found = unpack(library, pack_gated(library, [tensor, weight(format, (50, 512), 1)]))
    np.testing.assert_array_equal(found[1], values_of(weight(format, (50, 512), 1)))


@every_format
def test_packing_in_threads_is_the_same(library: KernelLibrary, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = weight(format, (500, 256))
    one = pack(library, [tensor])
    monkeypatch.setattr("headwater.devices.cpu.packed_weights._BYTES_PER_TASK", 10_000)
    np.testing.assert_array_equal(pack(library, [tensor], threads=3).blocks, one.blocks)


@every_format
def test_embedding_reads_rows(library: KernelLibrary, format: str) -> None:
    tensor = weight(format, (75, 512))
    packed, ids = pack(library, [tensor]), np.array([74, 0, 15, 16, 17, *range(20, 40), 74], np.int32)
    y = np.empty((len(ids), 512), np.float32)
    job = EmbedJob(
        weights=packed.blocks.ctypes.data,
        y=y.ctypes.data,
        in_features=512,
        format=packed.format_id,
        num_tokens=packed.out_features,
        scale=1.0,
    )
    library.run("embed", job, step_of(len(ids), token_ids=ids.ctypes.data))
    np.testing.assert_array_equal(y, plain.embed(ids, values_of(tensor)))


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0"])
def test_activations_are_quantised_as_in_numpy(library: KernelLibrary, format: str) -> None:
    x = activations(300, 96)
    if uses_tiles(library, format):
        check_bfloat16(library, x, format)
        return
    x[1], x[2, 32:64], x[3], x[4, 40] = 0, 1e-38, 1e36, -0.0
    largest = BITS_OF_ACTIVATIONS[format]
    values, scale = plain.quantize(x, largest)
    fields = [("values", np.int16 if format == "Q8_0" else np.int8, 32), ("scale", np.float32)]
    if format != "Q8_0":
        fields += [("scaled_sum", np.float32), ("sums", np.int16, 2)]
    found = quantize_rows(library, x, format).view(np.dtype(fields))
    np.testing.assert_allclose(found["values"], values, atol=1)  # a tie may fall to the other side
    assert (found["values"] == values).mean() > 0.999
    np.testing.assert_allclose(found["scale"], scale, rtol=1e-6)
    if format != "Q8_0":
        whole = found["values"].astype(np.int64).reshape(300, 3, 2, 16).sum(axis=-1)
        np.testing.assert_array_equal(found["sums"], whole)
        np.testing.assert_allclose(found["scaled_sum"], found["scale"] * whole.sum(axis=-1), rtol=1e-6)


def check_bfloat16(library: KernelLibrary, x: np.ndarray, format: str) -> None:
    """Times 2^54, rounded to nearest. Q8_0: with what the rounding left. Below: inputs 1 and 2 of a quad swapped."""
    parts = (quantize_rows(library, x, format).view(np.uint16).astype(np.uint32) << 16).view(np.float32) / 2.0**54
    if format == "Q8_0":
        high, low = parts.reshape(-1, 3, 2, 32).swapaxes(0, 2).swapaxes(1, 2).reshape(2, -1, 96)
        np.testing.assert_allclose(high + low, x, rtol=2**-16)
    else:
        high = parts.reshape(-1, 24, 4)[..., [0, 2, 1, 3]].reshape(-1, 96)
    np.testing.assert_allclose(high, x, rtol=2**-8)


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(library: KernelLibrary, format: str, bad: float) -> None:
    """A broken activation must end its own request, neither pass as a number nor spoil the others."""
    packed, x = pack(library, [weight(format, (32, 256))]), activations(9, 256)
    clean = multiply(library, packed, x)
    x[4, 37] = bad
    y = multiply(library, packed, x)
    assert not np.isfinite(y[4]).any()
    np.testing.assert_array_equal(np.delete(y, 4, axis=0), np.delete(clean, 4, axis=0))


@every_format
def test_the_largest_weights_and_activations_do_not_overflow(library: KernelLibrary, format: str) -> None:
    """Sums of 16 and 32 bits at their limits: all codes and all activations at one end, in every pairing of signs."""
    if format in BLOCKS:
        tensor = weight(format, (16, 256))
        data = tensor.data.copy()
        scale_bytes = {"Q8_0": [(0, 2, 34)], "Q4_0": [(0, 2, 18)], "Q4_1": [(0, 4, 20)], "Q4_K": [(0, 4, 144)],
                       "Q5_K": [(0, 4, 176)], "Q6_K": [(208, 210, 210)], "MXFP4": [(0, 1, 17)]}[format]  # fmt: skip
        for fill in (0xFF, 0x00, 0x7F, 0x80, 0x77):
            (begin, end, size) = scale_bytes[0]
            blocks = data.reshape(16, -1, size)
            keep = blocks[..., begin:end].copy()
            blocks[...] = fill
            blocks[..., begin:end] = keep
            check_extremes(library, HostTensor(format, tensor.shape, data))
    else:
        check_extremes(library, weight(format, (16, 256)))


def check_extremes(library: KernelLibrary, tensor: HostTensor) -> None:
    signs = np.ones((4, 256), np.float32)
    signs[1], signs[2, ::2], signs[3, 16::32] = -1, -1, -1
    x = seen(library, signs * 3, tensor.format)
    wide = values_of(tensor).astype(np.float64)
    found = multiply(library, pack(library, [tensor]), signs * 3)
    assert_close(found, x @ wide.T, x, wide, error=error_of(library, tensor.format))


@pytest.mark.parametrize("format", BLOCKS)
def test_quantised_activations_cost_little(library: KernelLibrary, format: str) -> None:
    """int8 activations err by less than 1.5 % of a product's size, int16 by less than 0.01 %, tiles by 0.3 %."""
    tensor, x = weight(format, (64, 1024)), np.random.default_rng(5).normal(size=(64, 1024)).astype(np.float32)
    exact = x @ values_of(tensor).T
    error = multiply(library, pack(library, [tensor]), x) - exact
    most = 0.003 if uses_tiles(library, format) else 1e-4 if format == "Q8_0" else 0.015
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < most


def test_a_step_without_rows_has_no_work(library: KernelLibrary) -> None:
    packed = pack(library, [weight("float32", (32, 8))])
    assert multiply(library, packed, np.empty((0, 8), np.float32)).shape == (0, 32)


def test_weights_that_do_not_fit_are_refused_by_shape(library: KernelLibrary) -> None:
    def zeros(*shape: int) -> HostTensor:
        return HostTensor.of(np.zeros(shape, np.float32))

    with pytest.raises(ValueError, match=r"one number of inputs, not shapes \(4, 8\), \(4, 16\)"):
        pack(library, [zeros(4, 8), zeros(4, 16)])
    with pytest.raises(ValueError, match=r"one shape, not \(4, 8\) and \(5, 8\)"):
        pack_gated(library, [zeros(4, 8), zeros(5, 8)])
    with pytest.raises(ValueError, match=r"not of shapes \(4, 0\)"):
        pack(library, [zeros(4, 0)])
    with pytest.raises(ValueError, match=r"\(3,\).* do not fit .*\(4, 8\)"):
        pack(library, [zeros(4, 8)], [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="one format, not Q4_0, Q8_0"):
        pack(library, [weight("Q4_0", (16, 32)), weight("Q8_0", (16, 32))])


@pytest.mark.parametrize("format", BLOCKS)
def test_inputs_that_fill_no_whole_blocks_are_refused(library: KernelLibrary, format: str) -> None:
    """The kernels compute whole blocks: the inputs behind them would be left out without a word."""
    good = weight(format, (20, 256))
    for in_features in (16, 40, 200, 257, 320):
        for row in (good.data, good.data[:, :-2]):
            with pytest.raises(ValueError, match=f"{format} matrix has whole blocks of .* not {in_features} inputs"):
                pack(library, [HostTensor(format, (20, in_features), row)])
    with pytest.raises(ValueError, match=f"not 256 inputs in {good.data.shape[1] - 2} bytes"):
        pack(library, [HostTensor(format, (20, 256), good.data[:, :-2])])


def test_formats_without_a_kernel_are_packed_as_float32(library: KernelLibrary) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    tensor = HostTensor("Q5_0", (20, 64), quantize(values, GGMLQuantizationType.Q5_0))
    packed = pack(library, [tensor])
    assert packed.format == "float32"
    np.testing.assert_array_equal(unpack(library, packed)[0], tensor.to_float32())
    assert aligned(3).ctypes.data % 64 == packed.blocks.ctypes.data % 64 == 0


@pytest.mark.emulated
@pytest.mark.parametrize("format", [*BLOCKS, "bfloat16"])
def test_products_by_tiles_are_right(emulated: KernelLibrary, format: str) -> None:
    """What the tests above say of every set, for tiles of one row up to several tiles."""
    assert uses_tiles(emulated, format)
    for rows in (1, 16, 50):
        test_a_product_is_right(emulated, format, rows)
    for shape in ((15, 2), (17, 3)):
        test_odd_shapes_are_right(emulated, format, shape)
    test_a_product_is_added_to_the_residual(emulated, format)
    test_gate_and_up(emulated, format, 24, True)
    test_what_is_not_finite_stays_visible_and_in_its_row(emulated, format, np.nan)
    test_the_largest_weights_and_activations_do_not_overflow(emulated, format)
    if format == "bfloat16":
        for in_features in (30, 66):
            test_plain_weights_take_any_number_of_inputs(emulated, format, in_features)
        return
    test_quantised_activations_cost_little(emulated, format)
    test_activations_are_quantised_as_in_numpy(emulated, format)


@pytest.mark.emulated
@pytest.mark.parametrize("format", [*BLOCKS, "bfloat16"])
def test_a_row_of_tiles_depends_neither_on_its_neighbours_nor_on_chunks(emulated: KernelLibrary, format: str) -> None:
    """Bit for bit, with inputs for more than one panel and rows for more than one chunk, in any order of chunks."""
    in_features = 48 * 32 + GROUP_OF[format]
    packed, x = pack(emulated, [weight(format, (36, in_features))]), activations(300, in_features)
    few = multiply(emulated, packed, x[:50])
    for row in (0, 15, 16, 32, 49):
        np.testing.assert_array_equal(multiply(emulated, packed, x[row : row + 1]), few[row : row + 1])
    for rows in (2, 17, 33):
        np.testing.assert_array_equal(multiply(emulated, packed, x[50 - rows : 50]), few[50 - rows :])
    if format == "Q4_1":  # the others are cut alike
        np.testing.assert_array_equal(multiply(emulated, packed, x)[:50], few)
        y = np.full((300, 36), np.nan, np.float32)
        for chunk in (3, 1, 2, 0):
            multiply(emulated, packed, x, chunks=[chunk], y=y)
        np.testing.assert_array_equal(multiply(emulated, packed, x), y)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_1", "Q6_K", "bfloat16"])
@pytest.mark.parametrize("num_decodes", [1, 19])
def test_decodes_beside_rows_of_tiles_are_computed_without(
    emulated_matrices: KernelLibrary, format: str, num_decodes: int
) -> None:
    """A row's kind decides: a decode has the bits of a set without AMX, a prompt those of a step without decodes."""
    emulated = emulated_matrices
    packed, x = pack(emulated, [weight(format, (72, 512))]), activations(num_decodes + 50, 512)
    mixed = multiply(emulated, packed, x, num_decodes=num_decodes)
    decodes = multiply(emulated, packed, x[:num_decodes], num_decodes=num_decodes)
    np.testing.assert_array_equal(mixed[:num_decodes], decodes)
    np.testing.assert_array_equal(mixed[num_decodes:], multiply(emulated, packed, x[num_decodes:]))
    assert (multiply(emulated, packed, x[:num_decodes]) != decodes).any()  # the kinds are two
    if not sanitized.LIBRARY:
        avx2 = KernelLibrary(build(emulated.isa), emulated.isa)
        np.testing.assert_array_equal(multiply(avx2, packed, x[:num_decodes]), decodes)
