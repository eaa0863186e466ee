"""The comparison as one self-contained HTML page with charts."""

from collections.abc import Sequence

from headwater.planning.comparison import Compared
from headwater.planning.fleet_result import TIERS
from headwater.planning.html_charts import LINE_COLORS, bars, curves, legend, page, table

_TIER_COLORS = {"device": "#2f6db3", "host": "#d98b1f", "storage": "#5f9e52"}
_COLUMNS = (  # name in FleetResult.summary, heading, how it is shown
    ("hit_rate_device", "hits device", "{:.1%}"),
    ("hit_rate_host", "hits host", "{:.1%}"),
    ("hit_rate_storage", "hits storage", "{:.1%}"),
    ("ttft_p50_s", "TTFT p50 s", "{:.3f}"),
    ("ttft_p99_s", "TTFT p99 s", "{:.3f}"),
    ("itl_p50_s", "ITL p50 s", "{:.4f}"),
    ("output_tokens_per_s", "output tok/s", "{:,.0f}"),
    ("utilization", "busy", "{:.0%}"),
    ("num_refused", "refused", "{:.0f}"),
)


def plan_page(compared: Sequence[Compared], *, workload: str) -> str:
    """The whole page. `workload` describes the workload in a sentence."""
    plan = compared[0].plan
    facts = (
        f"{plan.model.name} on {plan.hardware.name}, pages of {plan.page_size} tokens "
        f"({plan.page_bytes / 2**20:.2f} MiB), {plan.max_running} running, chunks of {plan.prefill_chunk_tokens}, "
        f"{plan.policy}, {plan.write_policy.value}, {plan.prefetch_policy.value}"
    )
    sections = (
        ("Figures", _table(compared)),
        ("Where prompt tokens were found", _hit_bars(compared)),
        ("Time to the first token", curves([(each.label, each.result.ttft_s) for each in compared])),
        ("Output tokens a second", _throughput_bars(compared)),
    )
    return page(
        title="Fleets compared",
        facts=(workload, facts),
        sections=sections,
        footer="Computed by the real scheduler and cache in virtual time; the times of steps and copies come from the "
        "cost model. Made by <code>headwater simulate --plan</code>.",
    )


def _table(compared: Sequence[Compared]) -> str:
    rows = []
    for each in compared:
        summary = each.result.summary()
        rows.append([each.label, *(shown.format(summary[name]) for name, _, shown in _COLUMNS)])
    return table(["fleet", *(heading for _, heading, _ in _COLUMNS)], rows)


def _hit_bars(compared: Sequence[Compared]) -> str:
    rows = []
    for each in compared:
        parts = [(each.result.hit_rate(tier), _TIER_COLORS[tier], tier) for tier in TIERS]
        rows.append((each.label, parts, f"{sum(share for share, _, _ in parts):.1%}"))
    return bars(rows, longest=1.0) + legend([(tier, _TIER_COLORS[tier]) for tier in TIERS])


def _throughput_bars(compared: Sequence[Compared]) -> str:
    rates = [each.result.summary()["output_tokens_per_s"] for each in compared]
    rows = [
        (each.label, [(rate, LINE_COLORS[0], "output tokens a second")], f"{rate:,.0f}")
        for each, rate in zip(compared, rates, strict=True)
    ]
    return bars(rows, longest=max([*rates, 1e-9]))
