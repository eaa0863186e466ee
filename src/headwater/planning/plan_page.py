"""The comparison as one self-contained HTML page with charts."""

import html
import math
from collections.abc import Sequence

from headwater.planning.comparison import Compared
from headwater.planning.fleet_result import TIERS

_TIER_COLORS = {"device": "#2f6db3", "host": "#d98b1f", "storage": "#5f9e52"}
_LINE_COLORS = ("#2f6db3", "#d1495b", "#5f9e52", "#d98b1f", "#7d5ba6", "#3a9fa8", "#8c6d4f", "#6b7280")
_WIDTH, _ROW_HEIGHT, _CHARACTER_WIDTH = 860, 30, 7
_STYLE = """
:root { color-scheme: light dark; --text: #1c2733; --faint: #7a8794; --line: #d5dbe1; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ee; --faint: #98a3af; --line: #38424d; --page: #14191f; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 980px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--text); font-size: 13px; }
svg .faint { fill: var(--faint); } svg .grid { stroke: var(--line); }
p, footer { color: var(--faint); }
"""
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
        ("Figures", f'<div class="scroll">{_table(compared)}</div>'),
        ("Where prompt tokens were found", _hit_bars(compared)),
        ("Time to the first token", _ttft_curves(compared)),
        ("Output tokens a second", _throughput_bars(compared)),
    )
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Headwater: fleets compared</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>Fleets compared</h1><p>{html.escape(workload)}<br>{html.escape(facts)}</p>{body}"
        "<footer>Computed by the real scheduler and cache in virtual time; the times of steps and copies come from the "
        "cost model. Made by <code>headwater simulate --plan</code>.</footer></body></html>\n"
    )


def _table(compared: Sequence[Compared]) -> str:
    head = "".join(f"<th>{heading}</th>" for _, heading, _ in _COLUMNS)
    rows = []
    for each in compared:
        summary = each.result.summary()
        cells = "".join(f"<td>{shown.format(summary[name])}</td>" for name, _, shown in _COLUMNS)
        rows.append(f"<tr><td>{html.escape(each.label)}</td>{cells}</tr>")
    return f"<table><thead><tr><th>fleet</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _hit_bars(compared: Sequence[Compared]) -> str:
    rows = []
    for each in compared:
        parts = [(each.result.hit_rate(tier), _TIER_COLORS[tier], tier) for tier in TIERS]
        rows.append((each.label, parts, f"{sum(share for share, _, _ in parts):.1%}"))
    return _bars(rows, longest=1.0) + _legend([(tier, _TIER_COLORS[tier]) for tier in TIERS])


def _throughput_bars(compared: Sequence[Compared]) -> str:
    rates = [each.result.summary()["output_tokens_per_s"] for each in compared]
    rows = [
        (each.label, [(rate, _LINE_COLORS[0], "output tokens a second")], f"{rate:,.0f}")
        for each, rate in zip(compared, rates, strict=True)
    ]
    return _bars(rows, longest=max([*rates, 1e-9]))


def _bars(rows: Sequence[tuple[str, list[tuple[float, str, str]], str]], *, longest: float) -> str:
    """A bar chart with rows of (label, parts of (length, color, title), text at the end)."""
    label_width = 12 + _CHARACTER_WIDTH * max(len(label) for label, _, _ in rows)
    scale = (_WIDTH - label_width - 80) / longest
    drawn = []
    for index, (label, parts, text) in enumerate(rows):
        y, x = index * _ROW_HEIGHT, float(label_width)
        drawn.append(f'<text x="{label_width - 8}" y="{y + 20}" text-anchor="end">{html.escape(label)}</text>')
        for length, color, title in parts:
            width = length * scale
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 5}" width="{width:.1f}" height="{_ROW_HEIGHT - 10}" fill="{color}">'
                f"<title>{html.escape(title)}: {length:.4g}</title></rect>"
            )
            x += width
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 20}">{text}</text>')
    return _svg(drawn, height=len(rows) * _ROW_HEIGHT)


def _ttft_curves(compared: Sequence[Compared]) -> str:
    """Curves of the share of requests with a first token by a time, on a logarithmic axis."""
    times = [each.result.ttft_s for each in compared]
    positive = [time for series in times for time in series if time > 0]
    if not positive:
        return "<p>No request generated anything.</p>"
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high = max(high, low + 1)
    left, top, width, height = 50, 10, _WIDTH - 70, 260

    def at(seconds: float, share: float) -> str:
        x = left + width * (math.log10(max(seconds, 10.0**low)) - low) / (high - low)
        return f"{x:.1f},{top + height * (1 - share):.1f}"

    drawn = []
    for power in range(low, high + 1):
        x = left + width * (power - low) / (high - low)
        drawn.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}"/>')
        drawn.append(
            f'<text class="faint" x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{10.0**power:g} s</text>'
        )
    for percent in (0, 50, 90, 99):
        y = top + height * (1 - percent / 100)
        drawn.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="faint" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    for index, series in enumerate(times):
        if series:
            points = [at(time, (rank + 1) / len(series)) for rank, time in _thinned(series)]
            color = _LINE_COLORS[index % len(_LINE_COLORS)]
            drawn.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>')
    legend = [(each.label, _LINE_COLORS[index % len(_LINE_COLORS)]) for index, each in enumerate(compared)]
    return _svg(drawn, height=top + height + 30) + _legend(legend)


def _thinned(series: Sequence[float], most: int = 400) -> list[tuple[int, float]]:
    """At most `most` of the values with their ranks, always with the last one."""
    step = max(1, len(series) // most)
    ranks = sorted({*range(0, len(series), step), len(series) - 1})
    return [(rank, series[rank]) for rank in ranks]


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    spans = (f'<span style="color:{color}">&#9632;</span> {html.escape(label)}' for label, color in entries)
    return f"<p>{' &emsp; '.join(spans)}</p>"


def _svg(drawn: Sequence[str], *, height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">{"".join(drawn)}</svg>'
