"""LoRA adapters in a CPU's program: the kernels against numpy, and rows whose bits depend on no other row."""

from dataclasses import replace

import numpy as np
import pytest
from program_steps import step_of

from headwater.devices.adapters import AdapterShape, random_adapter
from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.adapters.recorded import RecordedAdapters
from headwater.devices.cpu.adapters.tiles import TILE_ROWS, adapter_tiles
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.host_tensor import HostTensor

SITES = {"qkv": (64, (64, 16, 16)), "o": (64, (64,)), "gate_up": (64, (72, 72)), "down": (72, (64,))}
SHAPE = AdapterShape(num_layers=2, num_slots=4, max_rank=9, sites=SITES)
RANKS = (3, 9, 4)  # odd ones are filled up
NUM_ROWS = 41
X = np.random.default_rng(1).standard_normal((NUM_ROWS, 64), dtype=np.float32)
MIXED = np.array(([0, 1, 2, 3, 3] * 9)[:NUM_ROWS], dtype=np.int32)


class Recorded:
    """The products of a fused layer and of a gated one, with adapters."""

    def __init__(self, form: str, *, use_kernels: bool) -> None:
        device = CpuDevice(num_threads=2, use_kernels=use_kernels)
        memory = CpuAdapters(device.library, SHAPE, form=form)
        for slot, rank in enumerate(RANKS, 1):
            memory.place(slot, memory.prepare(random_adapter(SHAPE, rank=rank, seed=slot, form=form, scale=30.0)))
        self.program = device.start_program()
        x = device.pack_linear([HostTensor.of(X)]).embed(self.program.token_ids)
        adapters = RecordedAdapters(self.program, memory)
        ones = [HostTensor.of(np.full((96, 64), 0.01, dtype=np.float32))]
        self._qkv = self.program.keep(device.pack_linear(ones)(x))
        adapters.add("qkv", 1, x, self._qkv)
        random = np.random.default_rng(2)
        gate, up = (HostTensor.of(random.standard_normal((72, 64), dtype=np.float32)).astype(form) for _ in range(2))
        self._gated = self.program.keep(adapters.gated(1, device.pack_gated_linear(gate, up), x))

    def run(self, slots: np.ndarray, *, first: int = 0) -> list[np.ndarray]:
        """The products of rows from `first` on, whose adapters are in `slots`."""
        tiles = adapter_tiles(slots)
        step = replace(step_of(len(slots)), adapter_rows=tiles.rows, adapter_tiles=tiles.tiles)
        step.token_ids[:] += first
        self.program.run(step)
        return [self.program.view(it, step).copy() for it in (self._qkv, self._gated)]


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16"])
def test_kernels_compute_what_numpy_does(form: str) -> None:
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    found, expected = (Recorded(form, use_kernels=it).run(MIXED) for it in (True, False))
    tolerance = 2e-2 if form == "bfloat16" else 2e-5  # with AMX gate and up are rounded
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(np.abs(theirs).max()))


def test_a_row_has_its_bits_whatever_the_others_are() -> None:
    if usable_kernels() is None:
        pytest.skip("no kernels for this CPU, or no compiler")
    recorded = Recorded("float32", use_kernels=True)
    mixed, base = recorded.run(MIXED), recorded.run(np.zeros(NUM_ROWS, dtype=np.int32))
    for with_others, without in zip(mixed, base, strict=True):
        np.testing.assert_array_equal(with_others[MIXED == 0], without[MIXED == 0])
        assert not (with_others[MIXED > 0] == without[MIXED > 0]).all()
    for row in (1, 3, 17):
        alone = recorded.run(MIXED[row : row + 1], first=row)
        for one, many in zip(alone, mixed, strict=True):
            np.testing.assert_array_equal(one[0], many[row])
    one_adapter = recorded.run(np.full(NUM_ROWS, 3, dtype=np.int32))
    for many, others in zip(one_adapter, mixed, strict=True):
        np.testing.assert_array_equal(many[MIXED == 3], others[MIXED == 3])


def test_tiles_hold_the_rows_of_one_adapter() -> None:
    slots = np.array([2] * 20 + [0, 1, 2, 1], dtype=np.int32)
    rows, tiles = adapter_tiles(slots)
    assert tiles.tolist() == [[1, 0, 2], [2, 2, TILE_ROWS], [2, 2 + TILE_ROWS, 21 - TILE_ROWS]]
    assert rows.tolist() == [21, 23, *range(20), 22]
    assert len(adapter_tiles(np.zeros(5, dtype=np.int32)).tiles) == 0
