"""Goals for single requests (`ttft=200,itl=50`), and which requests met all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from headwater.bench.exchange import Exchange

MEASURES: dict[str, Callable[[Exchange], float]] = {  # seconds
    "ttft": lambda exchange: exchange.ttft_s,
    "itl": lambda exchange: exchange.itl_p99_s,
    "tpot": lambda exchange: exchange.tpot_s,
    "e2e": lambda exchange: exchange.e2e_s,
}


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds, by name. `itl` bounds the 99th percentile of a request's gaps between tokens."""

    limits_ms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """From `name=milliseconds`, with commas between. Raises ValueError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in MEASURES:
                raise ValueError(f"slo: {name!r} is not one of {', '.join(MEASURES)}; an example is ttft=200,itl=50")
            try:
                limit_ms = float(value)
            except ValueError:
                limit_ms = 0.0
            if not 0 < limit_ms < float("inf"):
                raise ValueError(f"slo: {name} needs milliseconds above 0, found {value!r}")
            if name in limits:
                raise ValueError(f"slo: {name} is given twice")
            limits[name] = limit_ms
        return cls(tuple(limits.items()))

    def is_met(self, exchange: Exchange) -> bool:
        """A request without an answer meets none."""
        return not exchange.error and all(MEASURES[name](exchange) * 1000 <= ms for name, ms in self.limits_ms)

    def __str__(self) -> str:
        return ",".join(f"{name}={ms:g}" for name, ms in self.limits_ms)
