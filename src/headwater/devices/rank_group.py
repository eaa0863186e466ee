"""The ranks that compute one model together (tensor parallelism): each has a share of the heads and of the columns.

All ranks run the same steps on the same pages, and meet in sums over ranks: after the attention's output projection,
after the MLP's down projection, for the embedding of the step's tokens, and for a QK-norm over all heads.
"""

from dataclasses import dataclass
from typing import Protocol


class RankFailed(RuntimeError):
    """A rank ended, stopped or gave up in a step. The step's numbers are wrong, and the group computes no more."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} {reason}")
        self.rank = rank


class RankGroup(Protocol):
    """One rank's view of its group. Rank 0 samples."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SoleRank:
    """A group of one: it never waits."""

    rank: int = 0
    size: int = 1


SOLE_RANK = SoleRank()
