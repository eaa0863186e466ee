"""The floor of an op: its bytes at the memory's rate, or its operations at the rate of their kind."""

import pytest

from headwater.devices.cpu.machine_speed import MachineSpeed
from headwater.profiling.op_work import OpWork

SPEED = MachineSpeed(num_threads=2, read_gb_s=20.0, gflop_s=100.0, int8_gop_s=400.0)


@pytest.mark.parametrize(
    ("work", "floor_s"),
    [
        (OpWork("linear Q4_1", num_bytes=20 * 10**9, operations=400 * 10**9, int_bits=8), 1.0),
        (OpWork("linear Q4_1", num_bytes=10**9, operations=800 * 10**9, int_bits=8), 2.0),
        (OpWork("linear Q8_0", num_bytes=10**9, operations=400 * 10**9, int_bits=16), 2.0),
        (OpWork("linear float32", num_bytes=60 * 10**9, operations=100 * 10**9), 3.0),
        (OpWork("norms"), 0.0),
    ],
)
def test_the_longer_one_of_reading_and_computing(work: OpWork, floor_s: float) -> None:
    assert work.floor_s(SPEED) == pytest.approx(floor_s)
