"""8-bit keys and values: the powers of two of their heads."""

import numpy as np
import pytest

from headwater.devices.float8 import from_float8, to_float8
from headwater.devices.kv_memory import FLOAT8_DTYPES


def _heads() -> np.ndarray:
    sizes = np.array([1e-9, 1e-4, 1.0, 300.0, 1e30], dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((5, 200, 64), dtype=np.float32) * sizes[:, None, None]
    x[0, 0] = 0
    return x


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_numbers_of_any_size_keep_their_bits(dtype: str) -> None:
    """Without a scale, values below 2^-9 would become zero, and large keys infinite."""
    x = _heads()
    found = from_float8(*to_float8(x, dtype), dtype)
    assert not found[0, 0].any()
    step = 2.0 ** -(4 if dtype == "float8_e4m3fn" else 3)  # half of a bit of the mantissa
    # below 2^-14 of a head's largest number, what matters is the error beside that
    allowed = np.abs(x) * step + np.abs(x).max(axis=-1, keepdims=True) * 2.0**-17
    assert (np.abs(found - x) <= allowed).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_the_bytes_are_those_of_pytorch(dtype: str) -> None:
    import torch

    from headwater.devices.cuda import float8 as of_torch

    x = _heads()
    x[3, :4, 5] = np.inf
    stored, exponents = to_float8(x, dtype)
    theirs, their_exponents = of_torch.to_float8(torch.from_numpy(x), getattr(torch, dtype))
    assert np.array_equal(exponents, their_exponents.numpy())
    assert np.array_equal(stored, theirs.view(torch.uint8).numpy())
    widened = of_torch.from_float8(theirs, their_exponents, torch.float32).numpy()
    assert np.array_equal(from_float8(stored, exponents, dtype), widened, equal_nan=True)
