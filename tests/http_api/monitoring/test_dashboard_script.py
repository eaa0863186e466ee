"""integrations/monitoring/dashboard_queries.py without its Prometheus: what it asks, and what it calls a failure."""

import sys
from pathlib import Path

INTEGRATIONS = Path(__file__).parents[3] / "integrations"
sys.path.append(str(INTEGRATIONS))

import monitoring.dashboard_queries as script  # noqa: E402
import monitoring.prometheus_server as server  # noqa: E402
from monitoring.dashboard_queries import Query  # noqa: E402

RULES = [
    {"name": "A", "query": 'up{job="headwater"} == 0', "health": "ok", "state": "inactive"},
    {"name": "B", "query": "resets(headwater_uptime_seconds[30m]) > 2", "health": "ok", "state": "firing"},
]


class AnswersWhenAsked:
    """A Prometheus that knows some series."""

    def __init__(self, *known: str) -> None:
        self._known = known

    def ask(self, query: str) -> list[str]:
        return [known for known in self._known if known in query]

    def alarms(self) -> list[dict[str, str]]:
        return RULES


def test_every_query_is_asked_as_grafana_would_ask_it() -> None:
    found = script.queries()
    assert len(found) > 50
    assert not [query for query in found if "$" in query.text], "Prometheus would refuse it"


def test_an_alarm_is_asked_for_what_it_compares() -> None:
    """With its comparison it has no series as long as all is well, which looks like a series that does not exist."""
    prometheus = AnswersWhenAsked()
    texts = [query.text for query in script.conditions(prometheus)]  # type: ignore[arg-type]
    assert texts == ['up{job="headwater"}', "resets(headwater_uptime_seconds[30m])"]
    assert script.has_fired(prometheus, "B")  # type: ignore[arg-type]


def test_a_panel_without_an_answer_fails_with_its_query() -> None:
    wanted = [Query("Hits", "rate(hits[1m])"), Query("Hits", "rate(misses[1m])"), Query("Up", "up")]
    left = script.ask_until_answered(AnswersWhenAsked("hits", "up"), wanted, limit_s=0.01)  # type: ignore[arg-type]
    assert left == [Query("Hits", "rate(misses[1m])")]
    hits, up = script.checks_of("panel", wanted, left)
    assert (hits["result"], hits["reason"]) == ("failed", "no answer: rate(misses[1m])")
    assert (up["check"], up["result"]) == ("panel: Up", "passed")


def test_prometheus_scrapes_the_server_with_our_alarms_in_seconds(tmp_path: Path) -> None:
    server._configure("http://127.0.0.1:1234", tmp_path)
    config, alarms = (tmp_path / "prometheus.yml").read_text(), (tmp_path / "alerts.yml").read_text()
    assert 'targets: ["127.0.0.1:1234"]' in config
    assert "scrape_interval: 1s" in config
    assert "for: 2s" in alarms
    assert "5m\n" not in alarms.replace("[5m]", "")
