"""The samples of the last hour, and what can be said of the newest part of them, as the operating page says it.

Counts grow since the start of an engine; a count that falls belongs to an engine that was started again.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

Sample = dict[str, int]
MAX_SAMPLES = 3700


class Series:
    """Samples in the order of their times."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def load(self, columns: Mapping[str, Sequence[int]]) -> None:
        """`columns`: each series as its first value and the steps between samples; a negative value is none."""
        self._samples.clear()
        values = {name: list(accumulate(steps)) for name, steps in columns.items()}
        for index in range(len(values.get("t", ()))):
            self._samples.append({name: found[index] for name, found in values.items() if found[index] >= 0})

    def push(self, sample: Mapping[str, int]) -> None:
        if not self._samples or sample["t"] > self._samples[-1]["t"]:
            self._samples.append(dict(sample))

    def window(self, range_s: float) -> list[Sample]:
        """The samples of the last `range_s` seconds."""
        if not self._samples:
            return []
        from_ms = self._samples[-1]["t"] - 1000 * range_s
        return [sample for sample in self._samples if sample["t"] >= from_ms]

    def growth(self, name: str, range_s: float) -> int:
        return sum(_step(before, now, name) for before, now in pairwise(self.window(range_s)))

    def per_second(self, name: str, range_s: float) -> float:
        found = self.window(range_s)
        if len(found) < 2:
            return 0.0
        return 1000 * self.growth(name, range_s) / (found[-1]["t"] - found[0]["t"])

    def quantile_s(self, kind: str, q: float, range_s: float, bounds_s: Sequence[float]) -> float:
        """A quantile of a histogram in the range, as Prometheus' histogram_quantile has it; NaN without any."""
        counts = [self.growth(f"{kind}.{index}", range_s) for index in range(len(bounds_s) + 1)]
        return quantile_of(counts, q, bounds_s)


def quantile_of(counts: Sequence[int], q: float, bounds_s: Sequence[float]) -> float:
    """`counts` are cumulative, one for each bound and one for infinity."""
    if not counts[-1]:
        return math.nan
    rank = q * counts[-1]
    index = next(index for index, count in enumerate(counts) if count >= rank)
    if index >= len(bounds_s):
        return math.inf
    low_s, below = (bounds_s[index - 1], counts[index - 1]) if index else (0.0, 0)
    return low_s + (bounds_s[index] - low_s) * (rank - below) / max(1e-9, counts[index] - below)


def _step(before: Sample, now: Sample, name: str) -> int:
    value = now.get(name, 0)
    growth = value - before.get(name, 0)
    return growth if growth >= 0 else value
