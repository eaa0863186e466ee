"""The result of a fleet for a workload: by request, and as a summary."""

from collections.abc import Sequence
from dataclasses import dataclass, field

TIERS = ("device", "host", "storage")


@dataclass(slots=True)
class RequestResult:
    """The result of one request, in the fleet's time."""

    sent_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    engine: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_retractions: int = 0
    cached: dict[str, int] = field(default_factory=dict)  # prompt tokens found in the cache, by tier
    is_refused: bool = False

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.sent_s

    @property
    def itl_s(self) -> float:
        """Mean time between tokens, of a request with at least two."""
        return (self.ended_s - self.first_token_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class FleetResult:
    """The results of all requests of a workload, in its order."""

    requests: tuple[RequestResult, ...]
    num_steps: int
    busy_s: tuple[float, ...]  # seconds spent in steps, by engine
    moved_pages: dict[str, int]  # by kind of transfer
    dropped_pages: dict[str, int]  # by cause

    @property
    def served(self) -> list[RequestResult]:
        return [request for request in self.requests if not request.is_refused]

    @property
    def num_refused(self) -> int:
        return len(self.requests) - len(self.served)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the end of the last request."""
        served = self.served
        if not served:
            return 0.0
        return max(request.ended_s for request in served) - min(request.sent_s for request in served)

    @property
    def ttft_s(self) -> list[float]:
        """Times to first token, ascending."""
        return sorted(request.ttft_s for request in self.served if request.num_output_tokens)

    @property
    def itl_s(self) -> list[float]:
        """Mean times between tokens of each request, ascending."""
        return sorted(request.itl_s for request in self.served if request.num_output_tokens > 1)

    def hit_rate(self, tier: str) -> float:
        """Share of all prompt tokens found on `tier`."""
        num_tokens = sum(request.num_prompt_tokens for request in self.served)
        return sum(request.cached.get(tier, 0) for request in self.served) / max(1, num_tokens)

    def summary(self) -> dict[str, float]:
        """Figures by name, for tables and files."""
        served, seconds = self.served, max(self.duration_s, 1e-9)
        num_output = sum(request.num_output_tokens for request in served)
        return {
            "num_requests": len(served),
            "num_refused": self.num_refused,
            **{f"hit_rate_{tier}": self.hit_rate(tier) for tier in TIERS},
            "ttft_p50_s": percentile(self.ttft_s, 50),
            "ttft_p99_s": percentile(self.ttft_s, 99),
            "itl_p50_s": percentile(self.itl_s, 50),
            "output_tokens_per_s": num_output / seconds,
            "prompt_tokens_per_s": sum(request.num_prompt_tokens for request in served) / seconds,
            "duration_s": self.duration_s,
            "utilization": sum(self.busy_s) / len(self.busy_s) / seconds,
            "num_retractions": sum(request.num_retractions for request in served),
        }


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The percentile of sorted values by nearest rank; 0 without values."""
    if not ascending:
        return 0.0
    rank = -(-len(ascending) * percent // 100)
    return ascending[max(0, min(len(ascending), int(rank)) - 1)]
