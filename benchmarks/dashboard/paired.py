"""The ratio of two ways that were measured in turns, with an interval of confidence, and what it says of a target."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """The mean ratio of pairs and the bounds between which the true one lies with the confidence."""

    mean: float
    low: float
    high: float

    def verdict(self, at_least: float) -> str:
        """`met`, `missed`, or `open` if the interval holds the target."""
        return "met" if self.low >= at_least else "missed" if self.high < at_least else "open"

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({100 * CONFIDENCE:.0f} %: {self.low:.4f} to {self.high:.4f})"


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """`pairs`: the value without and the value with, measured one after the other. At least 6 pairs.

    The geometric mean of second / first with the interval of Student's t for the logarithms: what drifts slowly falls
    out of each pair.
    """
    if len(pairs) < 6:
        raise ValueError(f"pairs must be at least 6, found {len(pairs)}")
    logs = [math.log(after / before) for before, after in pairs]
    mean = statistics.fmean(logs)
    margin = t_quantile(len(pairs) - 1) * statistics.stdev(logs) / math.sqrt(len(pairs))
    return Ratio(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))


def t_quantile(degrees: int) -> float:
    """The two-sided quantile of Student's t, for 5 degrees of freedom or more (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
