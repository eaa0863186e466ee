"""The figures of a round: what its clients saw, added up. Pure functions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from headwater.bench.exchange import Exchange
from headwater.bench.percentile import Distribution
from headwater.bench.slo import Slo


@dataclass(frozen=True, slots=True)
class Figures:
    """Latencies in seconds, over the requests that got their whole answer."""

    num_requests: int
    num_failed: int
    duration_s: float  # from the first request to the end of the last answer
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_events: int  # that carried the output tokens
    ttft_s: Distribution
    itl_s: Distribution  # all gaps between events with tokens
    tpot_s: Distribution  # of each request: the mean time of a token after the first
    e2e_s: Distribution
    request_tokens_per_s: Distribution  # of each request: output tokens over its whole time
    late_s: Distribution  # how long requests waited in the load generator
    errors: dict[str, int] = field(default_factory=dict)  # the most frequent ones
    goodput_per_s: float | None = None  # requests a second that met all goals; None without goals
    num_good: int | None = None

    @property
    def requests_per_s(self) -> float:
        return (self.num_requests - self.num_failed) / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.duration_s

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.num_prompt_tokens / self.duration_s

    @property
    def cached_share(self) -> float:
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)

    @property
    def tokens_per_event(self) -> float:
        return self.num_output_tokens / max(1, self.num_events)


def figures_of(exchanges: Sequence[Exchange], *, slo: Slo | None = None) -> Figures:
    """The figures of one round, which has at least one request."""
    good = [each for each in exchanges if not each.error]
    began_s = min(each.due_s for each in exchanges)
    duration_s = max(max(each.ended_s for each in exchanges) - began_s, 1e-9)
    num_good = None if slo is None else sum(slo.is_met(each) for each in exchanges)
    errors = Counter(each.error for each in exchanges if each.error)
    return Figures(
        num_requests=len(exchanges),
        num_failed=len(exchanges) - len(good),
        duration_s=duration_s,
        num_prompt_tokens=sum(each.told.num_prompt_tokens for each in good),
        num_cached_tokens=sum(each.told.num_cached_tokens for each in good),
        num_output_tokens=sum(each.told.num_output_tokens for each in good),
        num_events=sum(each.num_events for each in good),
        ttft_s=Distribution.of(each.ttft_s for each in good if each.num_events),
        itl_s=Distribution.of(gap for each in good for gap in each.gaps_s),
        tpot_s=Distribution.of(each.tpot_s for each in good if each.told.num_output_tokens > 1),
        e2e_s=Distribution.of(each.e2e_s for each in good),
        request_tokens_per_s=Distribution.of(each.tokens_per_s for each in good),
        late_s=Distribution.of(each.sent_s - each.due_s for each in exchanges),
        errors=dict(errors.most_common(5)),
        goodput_per_s=None if num_good is None else num_good / duration_s,
        num_good=num_good,
    )
