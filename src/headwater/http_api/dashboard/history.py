"""The samples of the last hour, so that a page has its charts when it is opened: dense for minutes, then thinner."""

from collections import deque
from itertools import pairwise
from typing import Any

Sample = dict[str, int]  # by name; `t` is Unix time in milliseconds

DENSE_SAMPLES = 300  # one a second
THIN_SAMPLES = 330
THIN_MS = 10_000
NO_VALUE = -1  # of a series that began later: no series has negative values


class History:
    """Bounded. Kept while no page is open, so that a page that is opened again shows the gap and what was before."""

    def __init__(self) -> None:
        self._dense: deque[Sample] = deque()
        self._thin: deque[Sample] = deque(maxlen=THIN_SAMPLES)

    def add(self, sample: Sample) -> None:
        self._dense.append(sample)
        if len(self._dense) <= DENSE_SAMPLES:
            return
        oldest = self._dense.popleft()
        if not self._thin or oldest["t"] - self._thin[-1]["t"] >= THIN_MS:
            self._thin.append(oldest)

    def columns(self) -> dict[str, list[int]]:
        """Each series as its first value and the steps from one sample to the next: mostly zeros."""
        samples = [*self._thin, *self._dense]
        names: dict[str, Any] = dict.fromkeys(name for sample in samples for name in sample)
        return {name: _steps([sample.get(name, NO_VALUE) for sample in samples]) for name in names}


def _steps(values: list[int]) -> list[int]:
    return values[:1] + [after - before for before, after in pairwise(values)]
