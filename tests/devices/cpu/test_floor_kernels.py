"""The machine's own limits (machine_speed.py), on every instruction set; under_sanitizers.py runs them as well."""

import numpy as np
import pytest

from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.machine_speed import measure_read_gb_s, measure_speed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_threads", [1, 3])
def test_every_rate_is_measured(library: KernelLibrary, num_threads: int) -> None:
    """A loop that the compiler removed would report rates that no machine has."""
    speed = measure_speed(library, num_threads=num_threads, limit_s=0.005)
    assert speed.num_threads == num_threads
    assert 0.01 < speed.read_gb_s < 5_000 * num_threads
    assert 0.1 < speed.gflop_s < 1_000 * num_threads
    assert 0.1 < speed.int8_gop_s < 8_000 * num_threads


def test_arrays_are_read_to_their_end_and_no_further(library: KernelLibrary) -> None:
    arrays = [np.ones(size, np.uint8) for size in (256 << 10, (3 << 18) + 5, 9 << 20)]
    assert measure_read_gb_s(library, arrays, num_threads=2, limit_s=0.005) > 0


def test_a_few_bytes_have_no_rate(library: KernelLibrary) -> None:
    """They lie in a cache: the matrices of a tiny model say nothing about the memory."""
    assert measure_read_gb_s(library, [np.ones(100, np.uint8)], num_threads=1) == 0.0
    assert measure_read_gb_s(library, [], num_threads=1) == 0.0
