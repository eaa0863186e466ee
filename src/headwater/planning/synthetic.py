"""Workloads drawn from distributions: shared prefixes by Zipf, conversations, Poisson arrivals."""

from dataclasses import dataclass

import numpy as np

from headwater.planning.trace import PlannedRequest, PromptPiece


@dataclass(frozen=True, slots=True)
class SyntheticWorkload:
    """Sessions that begin with one of several shared prefixes.

    Pauses are exponentially distributed. So are lengths, unless `has_exact_lengths`.
    """

    num_requests: int = 1000
    requests_per_s: float = 2.0  # on average, over all sessions
    num_prefixes: int = 20
    prefix_tokens: int = 1000  # 0: no shared prefixes
    zipf: float = 1.0  # 0: all prefixes are equally likely
    turns_per_session: int = 3
    think_s: float = 10.0  # between an answer and the next turn
    user_tokens: int = 100  # new tokens of a turn
    output_tokens: int = 200
    has_exact_lengths: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_requests": 1, "num_prefixes": 1, "turns_per_session": 1, "user_tokens": 1, "output_tokens": 1}
        for name in ("prefix_tokens", "zipf", "think_s", "seed"):
            least[name] = 0
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if not 0 < self.requests_per_s < float("inf"):
            raise ValueError(f"requests_per_s must be above 0, found {self.requests_per_s}")

    def requests(self) -> list[PlannedRequest]:
        """All requests, in the order of their sessions' arrivals."""
        source = np.random.default_rng(self.seed)
        weights = np.arange(1, self.num_prefixes + 1, dtype=np.float64) ** -self.zipf
        weights /= weights.sum()
        found: list[PlannedRequest] = []
        now_s = 0.0
        while len(found) < self.num_requests:
            now_s += source.exponential(self.turns_per_session / self.requests_per_s)
            prefix = int(source.choice(self.num_prefixes, p=weights))
            session = f"session {len(found)}"
            for turn in range(min(self.turns_per_session, self.num_requests - len(found))):
                is_shared = turn == 0 and self.prefix_tokens > 0
                shared = (PromptPiece(f"prefix {prefix}", self.prefix_tokens),) if is_shared else ()
                found.append(
                    PlannedRequest(
                        arrival_s=now_s,
                        num_output_tokens=self._length(source, self.output_tokens),
                        pieces=shared,
                        new_tokens=self._length(source, self.user_tokens),
                        session=session,
                        think_s=float(source.exponential(self.think_s)) if turn else 0.0,
                    )
                )
        return found

    def _length(self, source: np.random.Generator, mean: int) -> int:
        return mean if self.has_exact_lengths else max(1, round(source.exponential(mean)))
