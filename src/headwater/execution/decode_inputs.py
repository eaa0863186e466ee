"""The inputs of steps of decodes alone, on the device."""

import numpy as np

from headwater.devices.cuda.paged_batch import PagedBatch, RotaryTables
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.staging import ALIGNMENT, Ints, StagingRing

_IDLE_POSITION = -1  # at which kernels do nothing


class DecodeInputs:
    """Slots and positions of up to all rows. They stay at one address, where CUDA graphs read them."""

    def __init__(self, slots: DeviceSlots, *, rotary: RotaryTables) -> None:
        """`rotary`: cos and sin, a row for each position."""
        self._slots = slots
        self._rotary = rotary
        self._width = -(-slots.padding_slot // ALIGNMENT) * ALIGNMENT
        self._ring = StagingRing(slots.tables.device, num_ints=2 * self._width)

    def stage(self, slots: Ints, positions: Ints) -> None:
        """Send the rows of a step to the device; the others become padding."""
        inputs = np.empty((2, self._width), dtype=np.int32)
        inputs[0], inputs[1] = self._slots.padding_slot, _IDLE_POSITION
        inputs[0, : len(slots)], inputs[1, : len(slots)] = slots, positions
        self._ring.stage((inputs,))

    def stage_nothing(self) -> None:
        """Make all rows padding."""
        none = np.empty(0, dtype=np.int32)
        self.stage(none, none)

    def batch(self, num_rows: int) -> PagedBatch:
        """A step of the first `num_rows` rows. Reads what was staged last when its kernels run."""
        inputs = self._ring.on_device.view(2, self._width)
        slots, positions = inputs[0, :num_rows], inputs[1, :num_rows]
        return PagedBatch(
            num_decodes=num_rows,
            decode_slots=slots,
            positions=positions,
            rotary_rows=positions,
            tables=self._slots.tables,
            cos=self._rotary[0],
            sin=self._rotary[1],
        )
