"""The rounds as one self-contained HTML page."""

import html
from collections.abc import Sequence

from headwater.bench.exchange import Exchange
from headwater.bench.slo import Slo
from headwater.bench.tables import COLUMNS, latency_rows, notes_of, rates_of
from headwater.bench.turns import Ratio, Round
from headwater.planning.html_charts import curves, over_time, page, table

NUM_BINS = 80


def report(
    rounds: Sequence[Round], *, workload: str, facts: Sequence[str], found: Sequence[Ratio], slo: Slo | None
) -> str:
    """The whole page. `workload` and `facts` are sentences."""
    sections = [("Rates", _rates(rounds, slo)), ("Latencies", _latencies(rounds))]
    if found:
        cells = [[each.name, *(f"{value:.2f}" for value in (each.median, each.least, each.most))] for each in found]
        note = "<p>Round by round; above 1 means that the first server is better.</p>"
        sections.append(("Ratios", table(["", "median", "least", "most"], cells) + note))
    sections += [
        ("Time to the first token", curves([(_label(each), _ttfts(each)) for each in rounds])),
        ("Time between tokens", curves([(_label(each), _gaps(each)) for each in rounds])),
        ("Requests in flight", over_time([(_label(each), in_flight(each.exchanges)) for each in rounds])),
        ("Time to the first token, by the moment of the request", over_time([_by_arrival(each) for each in rounds])),
        ("Notes", _notes(rounds)),
    ]
    footer = "Made by <code>headwater bench</code>. Latencies count from the moment at which a request was due."
    return page(title="Load on a server", facts=(workload, *facts), sections=sections, footer=footer)


def in_flight(exchanges: Sequence[Exchange]) -> list[tuple[float, float]]:
    """(seconds of the round, requests that were sent and not yet answered), at evenly spaced moments."""
    began_s = min(each.due_s for each in exchanges)
    duration_s = max(max(each.ended_s for each in exchanges) - began_s, 1e-9)
    moments = [duration_s * index / NUM_BINS for index in range(NUM_BINS + 1)]
    spans = [(each.sent_s - began_s, each.ended_s - began_s) for each in exchanges]
    return [(at_s, float(sum(sent_s <= at_s < ended_s for sent_s, ended_s in spans))) for at_s in moments]


def _by_arrival(each: Round) -> tuple[str, list[tuple[float, float]]]:
    began_s = min(exchange.due_s for exchange in each.exchanges)
    points = [(e.due_s - began_s, e.ttft_s) for e in each.exchanges if not e.error and e.num_events]
    return _label(each), sorted(points)


def _label(each: Round) -> str:
    return f"{each.server}, round {each.number + 1}"


def _ttfts(each: Round) -> list[float]:
    return sorted(exchange.ttft_s for exchange in each.exchanges if not exchange.error and exchange.num_events)


def _gaps(each: Round) -> list[float]:
    return sorted(gap for exchange in each.exchanges if not exchange.error for gap in exchange.gaps_s)


def _rates(rounds: Sequence[Round], slo: Slo | None) -> str:
    columns = [dict(rates_of(each.figures, slo=slo)) for each in rounds]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    rows.append(["cache at the start", *(each.cold.words for each in rounds)])
    return table(["", *map(_label, rounds)], rows)


def _latencies(rounds: Sequence[Round]) -> str:
    rows = [[_label(each), *row] for each in rounds for row in latency_rows(each.figures)]
    return table(["round", "", *COLUMNS], rows)


def _notes(rounds: Sequence[Round]) -> str:
    lines = [f"{_label(each)}: {note}" for each in rounds for note in notes_of(each)]
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)
