"""Metric families of flushes, and of the time that pages stay."""

from headwater.http_api.monitoring.metric_families import MetricFamilies
from headwater.messages.state import EngineState

_RESIDENCY = {
    "page_lifetime_seconds": "From a page's arrival on a tier to its eviction; a sample of the pages.",
    "page_idle_before_eviction_seconds": "From a page's last use to its eviction; a sample of the pages.",
    "page_reuse_gap_seconds": "Between two uses of a cached page; a sample of the pages.",
}
_WAITED = "flush_waited_seconds"


def add_flushes(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """Flushes by mode and outcome, how long they waited, and the blockers of those that expired."""
    for ended, count in state.flushes.items():
        mode, _, outcome = ended.partition(":")
        text = "Flushes that were answered, by mode and outcome."
        page.counter("headwater_flushes", text, count, rank=rank, mode=mode, outcome=outcome)
    for blocker, count in state.flush_blockers.items():
        text = "Flushes whose deadline passed while this was in flight."
        page.counter("headwater_flush_blocked", text, count, rank=rank, blocker=blocker)
    for found in state.distributions:
        if found.name == _WAITED:
            page.histogram("Seconds that flushes waited until their answer, by mode.", found, rank=rank)


def add_residency(page: MetricFamilies, rank: str, state: EngineState) -> None:
    """How long pages stay on each tier, and how often they are used again."""
    for found in state.distributions:
        if (text := _RESIDENCY.get(found.name)) is not None:
            page.histogram(text, found, rank=rank)
