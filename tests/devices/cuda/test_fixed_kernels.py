"""The sums of --deterministic: right, and a row's bits are the same among any others."""

import pytest
import torch

from headwater.devices.cuda.kernels.fixed import add_fixed_linear, fixed_linear, fixed_logsumexp
from interpreted_triton import exact_dots

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _exact_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        exact_dots(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32])
def test_products_are_right_and_rows_do_not_meet(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, 72, device=PLACE, dtype=dtype), torch.randn(100, 72, device=PLACE, dtype=dtype)
    bias = torch.randn(100, device=PLACE, dtype=dtype)
    whole = fixed_linear(x, weight, bias, torch.empty(70, 100, device=PLACE))
    right = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(whole.double(), right, rtol=1e-4, atol=1e-4)
    rounded = fixed_linear(x, weight, bias)
    assert torch.equal(rounded, whole.to(dtype))
    for first, end in ((0, 1), (69, 70), (30, 37), (5, 70)):
        part = fixed_linear(x[first:end], weight, bias, torch.empty(end - first, 100, device=PLACE))
        assert torch.equal(part, whole[first:end])
    residual = torch.randn(70, 100, device=PLACE)
    total = residual.clone()
    add_fixed_linear(total, x, weight)
    torch.testing.assert_close(total.double(), right - bias.double() + residual.double(), rtol=1e-4, atol=1e-4)
    one = residual[3:4].clone()
    add_fixed_linear(one, x[3:4], weight)
    assert torch.equal(one, total[3:4])
    assert fixed_linear(x[:0], weight, None).shape == (0, 100)


def test_logsumexp_is_right_and_rows_do_not_meet() -> None:
    logits = torch.randn(5, 9000, device=PLACE) * 8
    logits[2, 5:] = -float("inf")
    found = fixed_logsumexp(logits)
    torch.testing.assert_close(found, logits.logsumexp(-1, keepdim=True))
    assert torch.equal(fixed_logsumexp(logits[3:4]), found[3:4])
    assert fixed_logsumexp(logits[:0]).shape == (0, 1)
