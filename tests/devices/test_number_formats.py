"""Numbers in 8 and 16 bits: every value, and rounding at its edges."""

import numpy as np
import pytest

from headwater.devices.number_formats import STORAGE_TYPES, narrow, widen

FLOATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def _all_bits(name: str) -> np.ndarray:
    storage = STORAGE_TYPES[name]
    bits = np.uint8 if storage.itemsize == 1 else np.uint16
    return np.arange(1 << (8 * storage.itemsize), dtype=bits).view(storage)


@pytest.mark.parametrize("name", FLOATS)
def test_every_number_survives_the_way_through_float32(name: str) -> None:
    stored = _all_bits(name)
    values = widen(stored, name)
    is_nan = np.isnan(values)
    assert np.array_equal(narrow(values, name)[~is_nan], stored[~is_nan])
    assert np.isnan(widen(narrow(values, name), name))[is_nan].all()


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_between_two_go_to_the_nearer_one_and_ties_to_the_even_one(name: str) -> None:
    bits = _all_bits(name)
    finite = bits[: len(bits) // 2][np.isfinite(widen(bits[: len(bits) // 2], name))]  # 0 and the positive ones
    low, high = widen(finite[:-1], name).astype(np.float64), widen(finite[1:], name).astype(np.float64)
    middle = (low + high) / 2
    is_exact = middle.astype(np.float32) == middle  # the smallest of bfloat16 have no middle in float32
    codes = finite.view(np.uint8 if finite.itemsize == 1 else np.uint16)
    even = np.where(codes[:-1] % 2 == 0, low, high)
    for sign in (1, -1):
        found = widen(narrow((sign * middle).astype(np.float32), name), name)
        assert np.array_equal(found[is_exact], (sign * even)[is_exact])
        above = np.nextafter(middle.astype(np.float32), np.float32(np.inf))
        assert np.array_equal(widen(narrow(sign * above, name), name)[is_exact], (sign * high)[is_exact])


def test_what_is_too_large_becomes_infinite_or_the_largest_number() -> None:
    large = np.array([1e6, -1e6, np.inf], dtype=np.float32)
    assert widen(narrow(large, "float16"), "float16").tolist() == [np.inf, -np.inf, np.inf]
    assert widen(narrow(large, "float8_e5m2"), "float8_e5m2").tolist() == [np.inf, -np.inf, np.inf]
    assert widen(narrow(large, "float8_e4m3fn"), "float8_e4m3fn").tolist() == [448, -448, 448]


def test_integers_are_no_target() -> None:
    with pytest.raises(ValueError, match="not converted to 'int8'"):
        narrow(np.zeros(1, dtype=np.float32), "int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOATS)
def test_conversions_are_those_of_pytorch(name: str) -> None:
    """A GPU writes the same pages, and stores are shared."""
    import torch

    generator = np.random.default_rng(0)
    values = generator.integers(0, 1 << 32, 2_000_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate((values, generator.standard_normal(500_000, dtype=np.float32) * 100))
    values = values[~np.isnan(values)]
    stored = torch.from_numpy(values).to(getattr(torch, name))
    bits = stored.view(torch.uint8 if stored.itemsize == 1 else torch.uint16).numpy()
    assert np.array_equal(narrow(values, name).view(bits.dtype), bits)
    assert np.array_equal(widen(narrow(values, name), name), stored.float().numpy(), equal_nan=True)
