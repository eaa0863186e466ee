"""A self-contained HTML page with charts in SVG: light and dark, no script, nothing from elsewhere."""

import html
import math
from collections.abc import Sequence

LINE_COLORS = ("#2f6db3", "#d1495b", "#5f9e52", "#d98b1f", "#7d5ba6", "#3a9fa8", "#8c6d4f", "#6b7280")
_WIDTH, _ROW_HEIGHT, _CHARACTER_WIDTH = 860, 30, 7
_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 60, 10, _WIDTH - 80, 260
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


def page(*, title: str, facts: Sequence[str], sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole page. `facts` are lines of text; the content of sections and the footer are HTML."""
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Headwater: {html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1><p>{'<br>'.join(map(html.escape, facts))}</p>{body}"
        f"<footer>{footer}</footer></body></html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are texts. The first column names the row."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(rows: Sequence[tuple[str, list[tuple[float, str, str]], str]], *, longest: float) -> str:
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


def curves(series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Curves of the share of observations up to a time, on a logarithmic axis: (label, ordered seconds) of each."""
    positive = [time for _, times in series for time in times if time > 0]
    if not positive:
        return "<p>Nothing was observed.</p>"
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high = max(high, low + 1)

    def at(seconds: float, share: float) -> str:
        x = _LEFT + _PLOT_WIDTH * (math.log10(max(seconds, 10.0**low)) - low) / (high - low)
        return f"{x:.1f},{_TOP + _PLOT_HEIGHT * (1 - share):.1f}"

    drawn = []
    for power in range(low, high + 1):
        drawn += _upright(_LEFT + _PLOT_WIDTH * (power - low) / (high - low), f"{10.0**power:g} s")
    for percent in (0, 50, 90, 99):
        drawn += _level(_TOP + _PLOT_HEIGHT * (1 - percent / 100), f"{percent} %")
    for index, (_, times) in enumerate(series):
        if times:
            points = [at(time, (rank + 1) / len(times)) for rank, time in _thinned(times)]
            drawn.append(_line(points, LINE_COLORS[index % len(LINE_COLORS)]))
    return _plot(drawn) + _legend_of([label for label, _ in series])


def over_time(series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines of a value over the seconds of a round, both axes linear: (label, points of (seconds, value)) of each."""
    points = [point for _, found in series for point in found]
    if not points:
        return "<p>Nothing was observed.</p>"
    step_x, step_y = (_round_step(max(value for value in axis) / 6) for axis in zip(*points, strict=True))
    most_x, most_y = (
        step * max(1, math.ceil(max(axis) / step - 1e-9))
        for step, axis in zip((step_x, step_y), zip(*points, strict=True), strict=True)
    )

    def at(seconds: float, value: float) -> str:
        return f"{_LEFT + _PLOT_WIDTH * seconds / most_x:.1f},{_TOP + _PLOT_HEIGHT * (1 - value / most_y):.1f}"

    drawn = []
    for index in range(round(most_x / step_x) + 1):
        drawn += _upright(_LEFT + _PLOT_WIDTH * index * step_x / most_x, f"{index * step_x:g} s")
    for index in range(round(most_y / step_y) + 1):
        drawn += _level(_TOP + _PLOT_HEIGHT * (1 - index * step_y / most_y), f"{index * step_y:g}")
    for index, (_, found) in enumerate(series):
        drawn.append(_line([at(*point) for point in found], LINE_COLORS[index % len(LINE_COLORS)]))
    return _plot(drawn) + _legend_of([label for label, _ in series])


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(label, colour) of each."""
    spans = (f'<span style="color:{color}">&#9632;</span> {html.escape(label)}' for label, color in entries)
    return f"<p>{' &emsp; '.join(spans)}</p>"


def _legend_of(labels: Sequence[str]) -> str:
    return legend([(label, LINE_COLORS[index % len(LINE_COLORS)]) for index, label in enumerate(labels)])


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... that is not smaller."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _upright(x: float, label: str) -> list[str]:
    bottom = _TOP + _PLOT_HEIGHT
    return [
        f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>',
        f'<text class="faint" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{label}</text>',
    ]


def _level(y: float, label: str) -> list[str]:
    return [
        f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _PLOT_WIDTH}" y2="{y:.1f}"/>',
        f'<text class="faint" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
    ]


def _line(points: Sequence[str], color: str) -> str:
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>'


def _plot(drawn: Sequence[str]) -> str:
    return _svg(drawn, height=_TOP + _PLOT_HEIGHT + 30)


def _thinned(series: Sequence[float], most: int = 400) -> list[tuple[int, float]]:
    """At most `most` of the values with their ranks, always with the last one."""
    step = max(1, len(series) // most)
    ranks = sorted({*range(0, len(series), step), len(series) - 1})
    return [(rank, series[rank]) for rank in ranks]


def _svg(drawn: Sequence[str], *, height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">{"".join(drawn)}</svg>'
