"""Host tensors as PyTorch's and back: nothing is copied or rounded without need."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

from gguf import GGMLQuantizationType  # noqa: E402
from gguf.quants import quantize  # noqa: E402

from headwater.devices.cuda.torch_tensors import (  # noqa: E402
    dtype_name,
    from_host,
    place_tensor,
    to_host,
    torch_dtype,
)
from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor, RandomTensor  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_every_format_goes_to_pytorch_and_back_in_the_same_memory(name: str) -> None:
    data = np.arange(24).reshape(2, 12).astype(STORAGE_TYPES[name])
    there = from_host(HostTensor(name, (2, 12), data))
    assert dtype_name(there.dtype) == name and there.dtype == torch_dtype(name)
    assert np.array_equal(there.float().numpy(), HostTensor(name, (2, 12), data).to_float32(), equal_nan=True)
    back = to_host(there)
    assert (back.format, back.shape, back.data.ctypes.data) == (name, (2, 12), data.ctypes.data)
    assert to_host(there, max_rows=1).shape == (1, 12)


def test_views_and_scalars_come_to_the_host_in_order() -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    assert to_host(wide.t(), max_rows=2).data.tolist() == [[0, 4, 8], [1, 5, 9]]
    assert to_host(wide.to(torch.bfloat16)[:, 1:3]).to_float32().tolist() == [[1, 2], [5, 6], [9, 10]]


def test_a_weight_is_placed_as_the_dtype_that_is_asked_for() -> None:
    values = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    plain = HostTensor.of(values)
    assert place_tensor(plain, dtype="float32", device=CPU).numpy().ctypes.data == values.ctypes.data
    for weight in (plain, HostTensor("Q8_0", (4, 64), quantize(values, GGMLQuantizationType.Q8_0))):
        placed = place_tensor(weight, dtype="bfloat16", device=CPU)
        assert placed.dtype == torch.bfloat16 and placed.shape == (4, 64)
        assert np.allclose(placed.float().numpy(), values, atol=0.05)
    with pytest.raises(ValueError, match="'Q8_0' is no dtype of PyTorch"):
        place_tensor(plain, dtype="Q8_0", device=CPU)


def test_random_weights_on_a_cpu_are_those_that_numpy_makes() -> None:
    weight = RandomTensor((50, 40), seed=7, scale=0.5)
    placed = place_tensor(weight, dtype="float32", device=CPU).numpy()
    assert (placed == weight.to_host().data).all() and (
        placed != RandomTensor((50, 40), seed=8, scale=0.5).to_host().data
    ).all()
    assert abs(placed.std() - 0.5) < 0.05 and abs(placed.mean()) < 0.05
