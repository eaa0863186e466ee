"""Plain weights in blocks, against the gguf package's quantiser."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from headwater.devices.host_tensor import HostTensor
from headwater.devices.quantise import can_quantise, quantise


def _values(seed: int, shape: tuple[int, int] = (37, 96)) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    values[3] = 0  # blocks without a scale
    values[4, :32] = np.float32(1e-30)  # and with one that float16 does not hold
    values[5] *= np.float32(1e4)
    values[6, 32:64] = -np.abs(values[6, 32:64])
    return values


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("at_once", [1, 200, 1 << 20])
def test_the_blocks_are_those_of_the_gguf_package(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the two tools would otherwise give other texts; rows in pieces must all arrive."""
    monkeypatch.setattr("headwater.devices.quantise._NUMBERS_AT_ONCE", at_once)
    values = _values(0)
    found = quantise(HostTensor.of(values), name)
    assert (found.format, found.shape) == (name, (37, 96))
    assert np.array_equal(found.data, quants.quantize(values, GGMLQuantizationType[name]))


@pytest.mark.parametrize(("name", "step"), [("Q8_0", 1 / 127), ("Q4_0", 1 / 8)])
def test_no_number_moves_by_more_than_a_step(name: str, step: float) -> None:
    """The largest of a block may lose half a step to its scale's rounding, and the end of the range a whole one."""
    values = _values(1)
    values[4] = 0  # too small for a float16 scale: such blocks become zeros
    found = quantise(HostTensor.of(values), name).to_float32()
    largest = np.abs(values).reshape(37, 3, 32).max(axis=-1).repeat(32, axis=-1)
    assert (np.abs(found - values) <= 1.01 * step * largest + 1e-7).all()


def test_16_bit_weights_are_quantised_as_their_numbers_are() -> None:
    tensor = HostTensor.of(_values(2)).astype("bfloat16")
    assert np.array_equal(quantise(tensor, "Q8_0").data, quantise(HostTensor.of(tensor.to_float32()), "Q8_0").data)


def test_only_matrices_of_whole_blocks_are_quantised() -> None:
    def plain(*shape: int) -> HostTensor:
        return HostTensor.of(np.zeros(shape, dtype=np.float32))

    assert can_quantise(plain(3, 64)) and not can_quantise(plain(64)) and not can_quantise(plain(64, 48))
    assert not can_quantise(quantise(plain(3, 64), "Q8_0")), "blocks are not rounded a second time"
