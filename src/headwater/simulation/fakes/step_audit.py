"""What the fake runner reports of its steps, to an observer that knows what is right."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from headwater.scheduling.plan import SlotAssignment
from headwater.simulation.fakes.kv_records import Records


class StepAudit(Protocol):
    """An observer that knows the right contents of each slot."""

    @property
    def turn(self) -> int:
        """The time of birth of KV that is computed now."""
        ...

    def failed(self, slots: set[int]) -> None:
        """The step of the requests in `slots` raises now."""
        ...

    def entered(self, assignment: SlotAssignment, num_cached: int) -> tuple[str, int]:
        """A request enters a slot with `num_cached` tokens' KV. Returns its namespace
        without the adapter, and its sequence's index.
        """
        ...

    def pages_changed(self, slot: int, first: int, pages: npt.NDArray[np.integer]) -> None:
        """The pages of the slot from index `first` on are now `pages`."""
        ...

    def copied(self, slot: int, source: int, read: Records) -> None:
        """The page behind the slot's cached ones begins with a copy of `read`, TOKEN[n], out of page `source`."""
        ...

    def invalidated(self, slot: int) -> None:
        """The last KV of the request in `slot` is invalid, and so is all that follows from it."""
        ...

    def computed(
        self, slot: int, first: int, tokens: list[int], *, read: bytes, noise_at: int | None, is_draft: bool
    ) -> None:
        """Positions from `first` on were computed from `tokens`; `read` is all KV up to their end, uint64 each.

        Checks `read`, and calls `check_written` if it is wrong. `noise_at` is the position of the noise, None if the
        row does not sample. `is_draft`: the row follows another of its slot.
        """
        ...
