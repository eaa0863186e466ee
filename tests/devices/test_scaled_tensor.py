"""Codes with scales: the numbers they mean, parts of them, and GGUF's blocks of the same numbers."""

import numpy as np
import pytest

from headwater.devices.number_formats import narrow, widen
from headwater.devices.scaled_tensor import ScaledTensor


def make(
    form: str, shape: tuple[int, int], tile: tuple[int, int], *, seed: int = 0, has_zeros: bool = False
) -> tuple[ScaledTensor, np.ndarray]:
    """A tensor, and its numbers as the definition says, one at a time."""
    rng = np.random.default_rng(seed)
    tiles = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    scales = rng.uniform(0.01, 0.02, size=tiles).astype(np.float16).astype(np.float32)
    if form == "int4":
        codes, zeros = rng.integers(0, 16, size=shape), rng.integers(0, 16, size=tiles)
        stored = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        zeros = zeros if has_zeros else np.full(tiles, 8)
    elif form == "int8":
        codes, zeros = rng.integers(-128, 128, size=shape), rng.integers(-8, 8, size=tiles)
        stored, zeros = codes.astype(np.int8), zeros if has_zeros else np.zeros(tiles, int)
    else:
        stored = narrow(rng.normal(scale=50, size=shape).astype(np.float32), form)
        codes, zeros = widen(stored, form), np.zeros(tiles)
    weight = [
        [
            (codes[r, c] - zeros[r // tile[0], c // tile[1]]) * scales[r // tile[0], c // tile[1]]
            for c in range(shape[1])
        ]
        for r in range(shape[0])
    ]
    kept = -zeros.astype(np.float32) * scales if has_zeros else None
    return ScaledTensor(form, shape, stored, scales, tile=tile, offsets=kept), np.array(weight, np.float32)  # type: ignore[arg-type]


CASES = [
    ("int4", (6, 64), (1, 32), False),
    ("int4", (6, 256), (1, 128), True),
    ("int4", (5, 96), (1, 96), True),
    ("int8", (5, 64), (1, 64), False),
    ("int8", (4, 64), (1, 32), True),
    ("float8_e4m3fn", (5, 40), (2, 16), False),
    ("float8_e4m3fn", (5, 40), (5, 40), False),
]


@pytest.mark.parametrize(("form", "shape", "tile", "has_zeros"), CASES)
def test_numbers_are_those_of_the_definition(form: str, shape: tuple, tile: tuple, has_zeros: bool) -> None:
    tensor, weight = make(form, shape, tile, has_zeros=has_zeros)
    assert np.allclose(tensor.to_float32(), weight, rtol=1e-6, atol=1e-6)
    assert np.array_equal(tensor.astype("bfloat16").data, narrow(tensor.to_float32(), "bfloat16"))


@pytest.mark.parametrize(("form", "shape", "tile", "has_zeros"), CASES)
def test_a_part_has_the_numbers_of_the_whole(form: str, shape: tuple, tile: tuple, has_zeros: bool) -> None:
    """Cuts through tiles as well: ranks cut where their heads end, which need not be where scales do."""
    tensor, _ = make(form, shape, tile, has_zeros=has_zeros)
    weight = tensor.to_float32()
    for start, stop in ((0, 3), (1, 4), (3, shape[0]), (0, shape[0])):
        assert np.array_equal(tensor.rows(start, stop).to_float32(), weight[start:stop])
    for start, stop in ((0, 16), (16, 32), (8, shape[1]), (2, 6), (0, shape[1])):
        assert np.array_equal(tensor.columns(start, stop).to_float32(), weight[:, start:stop])
        assert np.array_equal(tensor.rows(1, 3).columns(start, stop).to_float32(), weight[1:3, start:stop])


def test_codes_in_another_order_go_back_to_their_inputs() -> None:
    tensor, weight = make("int4", (3, 64), (1, 32))
    order = np.random.default_rng(1).permutation(64)
    moved = ScaledTensor("int4", (3, 64), tensor.codes, tensor.scales, tile=(1, 32), order=order)
    found = moved.to_float32()
    assert np.array_equal(found[:, order], weight)
    assert moved.to_blocks() is None
    with pytest.raises(ValueError, match="desc_act"):
        moved.columns(0, 32)


@pytest.mark.parametrize(
    ("form", "tile", "has_zeros", "name"),
    [
        ("int4", (1, 32), False, "Q4_0"),
        ("int4", (1, 128), False, "Q4_0"),
        ("int4", (1, 64), True, "Q4_1"),
        ("int4", (4, 256), True, "Q4_1"),
        ("int8", (1, 128), False, "Q8_0"),
        ("int8", (1, 256), False, "Q8_0"),
    ],
)
def test_blocks_hold_the_same_numbers(form: str, tile: tuple, has_zeros: bool, name: str) -> None:
    """Q4_1's offset is zero times scale as float16: the error is below 1/200 of the step between two codes."""
    tensor, weight = make(form, (5, 256), tile, has_zeros=has_zeros)
    blocks = tensor.to_blocks()
    assert blocks is not None and blocks.format == name
    steps = np.repeat(np.repeat(tensor.scales, tile[0], axis=0)[:5], tile[1], axis=1)[:, :256]
    error = np.abs(blocks.to_float32() - weight) / steps
    assert error.max() < (0.005 if has_zeros else 1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6, np.nan])
def test_scales_that_float16_cannot_hold_make_no_blocks(scale: float) -> None:
    tensor, _ = make("int4", (2, 64), (1, 32))
    tensor.scales[1, 1] = scale
    assert tensor.to_blocks() is None


def test_what_has_no_blocks() -> None:
    for form, shape, tile, has_zeros in (
        ("int4", (2, 48), (1, 48), False),  # no whole blocks
        ("int4", (2, 64), (1, 16), False),  # two scales in a block
        ("int8", (2, 64), (1, 32), True),
        ("float8_e4m3fn", (2, 64), (1, 32), False),
    ):
        assert make(form, shape, tile, has_zeros=has_zeros)[0].to_blocks() is None
