"""One token times a large matrix, against PyTorch; without a GPU under Triton's interpreter, where few rows do."""

import pytest
import torch
import torch.nn.functional as F

from headwater.devices.cuda.kernels.few_rows.stream import stream, suits_stream
from headwater.devices.cuda.kernels.rows import UnnormedRows

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(PLACE)


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("num_rows", [1, 38])  # fewer than programs have, and a number that no group of rows divides
@pytest.mark.parametrize("width", [200, 4096])
def test_products_with_norm_bias_and_gate(*, is_float8: bool, num_rows: int, width: int) -> None:
    numbers = _random(2 * num_rows, width, seed=1) / width**0.5
    scales, weight = None, numbers
    if is_float8:
        codes = numbers.to(torch.float8_e4m3fn)
        scales = 0.5 + 0.1 * _random(2 * num_rows, 1, seed=2).abs()
        weight, numbers = codes.view(torch.uint8), codes.float() * scales
    bias, norm = _random(2 * num_rows, seed=3), _random(width, seed=4)
    x = _random(1, width, seed=5)
    y = torch.full((1, 2 * num_rows), 7.0, device=PLACE)
    stream(x, weight, scales, None, y, adds=False)
    torch.testing.assert_close(y, x @ numbers.T, rtol=1e-4, atol=1e-4)
    stream(x, weight, scales, bias, y, adds=True)
    torch.testing.assert_close(y, 2 * (x @ numbers.T) + bias, rtol=1e-4, atol=1e-4)
    normed = F.rms_norm(x, (width,), norm + 1, 1e-5)
    both = F.linear(normed, numbers, bias)
    stream(UnnormedRows(x, norm, 1e-5, 1.0), weight, scales, bias, y, adds=False)
    torch.testing.assert_close(y, both, rtol=1e-4, atol=1e-3)
    gated = torch.empty((1, num_rows), device=PLACE)
    gate, up = both.chunk(2, dim=1)
    for is_gelu, expected in ((False, F.silu(gate) * up), (True, F.gelu(gate, approximate="tanh") * up)):
        rows = UnnormedRows(x, norm, 1e-5, 1.0)
        stream(rows, weight, scales, bias, gated, adds=False, is_gated=True, is_gelu=is_gelu)
        torch.testing.assert_close(gated, expected, rtol=1e-3, atol=1e-3)


def test_it_is_for_large_matrices_whose_rows_fit() -> None:
    def suits(num_rows: int, width: int, dtype: torch.dtype = torch.bfloat16, *, is_gated: bool = False) -> bool:
        return suits_stream(torch.empty((num_rows, width), dtype=dtype, device="meta"), is_gated=is_gated)

    assert suits(28672, 4096, is_gated=True) and suits(28672, 4096, torch.uint8, is_gated=True)
    assert suits(6144, 4096) and suits(4096, 14336)
    assert not suits(5120, 2048), "less than 32 MB"
    assert not suits(4096, 14336, torch.uint8), "less than 96 MB of codes"
    assert not suits(8192, 28672) and not suits(57344, 16384, is_gated=True), "long rows"
