"""How far each rank is with its steps, and which one holds up the others.

A rank can hang while its process lives: within NCCL, in a kernel, in a lock. Then the sign of life goes on, and its
steps do not.
"""

from collections.abc import Sequence

from headwater.scheduling.plan import StepHandle

_LATE_S = 0.5  # that a rank's counts may be old
Position = tuple[int, ...]  # steps that have ended, steps that were launched, and what the device counts within a step


class StepProgress:
    """The steps of one rank. One thread launches them and calls `begin` and `launched`, another one calls `look`."""

    def __init__(self) -> None:
        self.num_begun = 0
        self._newest: tuple[int, StepHandle | None] = (0, None)
        self._watched = self._newest  # of steps that follow each other, the newest is never seen to have ended
        self._num_ended = 0

    def begin(self) -> None:
        """The next step is there."""
        self.num_begun += 1

    def launched(self, handle: StepHandle | None) -> None:
        """The step begun last computes, or has failed (None)."""
        self._newest = self.num_begun, handle

    def look(self) -> Position:
        """Steps that have ended on the device, and steps that were launched."""
        newest = self._newest
        for number, handle in (newest, self._watched):
            if handle is None or handle.is_done():
                self._num_ended = max(self._num_ended, number)
                self._watched = newest
                break
        return self._num_ended, newest[0]


class StepWatch:
    """Finds the rank that has not moved for `limit_s`, though a step that was launched has not ended on it."""

    def __init__(self, *, limit_s: float) -> None:
        self.limit_s = limit_s
        self._moved: dict[int, tuple[Position, float]] = {}  # rank -> where it is, and since when

    def find(self, now_s: float, num_begun: int, positions: Sequence[Position]) -> tuple[int, str] | None:
        """A rank and what is wrong with it. `positions` are those of all ranks, rank 0 first; greater is further."""
        stood_s = 0.0
        for rank, position in enumerate(positions[1:], start=1):
            if position[0] >= num_begun:
                self._moved.pop(rank, None)
            elif rank not in self._moved or self._moved[rank][0] != position:
                self._moved[rank] = position, now_s
            else:
                stood_s = max(stood_s, now_s - self._moved[rank][1])
        if stood_s <= self.limit_s + _LATE_S:
            return None
        last = [rank for rank, position in enumerate(positions) if position == min(positions)]
        first, *rest = sorted(last, key=lambda rank: rank == 0)  # rank 0 is the engine itself
        others = "".join(f"and rank {rank} " for rank in rest)
        have = "have" if others else "has"
        return first, f"{others}{have} not finished a step for {stood_s:.1f} s (--rank-timeout)"
