"""deploy/: a dashboard or an alarm on a metric that does not exist stays empty and silent, and nobody notices."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml
from full_page import full_page, promtool
from prometheus_client.parser import text_string_to_metric_families

from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]
GRAFANA = ROOT / "deploy" / "grafana"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
SERIES = re.compile(r"\b((?:headwater_|sglang:|vllm:)\w+)(?:\{([^}]*)\})?")
OF_PROMETHEUS = {"instance", "job"}  # labels that the scrape adds


def queries_of_the_dashboard() -> list[str]:
    panels = json.loads((GRAFANA / "headwater.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


async def series_on_the_page(engine: ScriptedEngine) -> dict[str, set[str]]:
    """Name of a series -> its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(await full_page(engine)):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_series_and_label_of_dashboard_and_alarms_is_on_our_page(engine: ScriptedEngine) -> None:
    there = await series_on_the_page(engine)
    queries = queries_of_the_dashboard() + [rule["expr"] for rule in rules()]
    assert len(queries) > 60
    for query in queries:
        named = SERIES.findall(query)
        labels = {label for name, _ in named for label in there.get(name, ())} | OF_PROMETHEUS
        assert [name for name, _ in named if name not in there] == [], query
        for name, selector in named:
            wanted = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector))
            assert wanted <= there[name] | OF_PROMETHEUS, query
        for grouped in re.findall(r"\bby \(([^)]*)\)", query):
            assert set(re.split(r"[,\s]+", grouped)) <= labels, query


def test_the_dashboard_is_what_its_script_writes() -> None:
    made = runpy.run_path(str(GRAFANA / "make_dashboard.py"))["text"]()
    assert (GRAFANA / "headwater.json").read_text() == made, "run deploy/grafana/make_dashboard.py"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((GRAFANA / "headwater.json").read_text())["panels"]:
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in lines}
        assert cells.isdisjoint(taken), panel["title"]
        taken |= cells


def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    """Grafana shows a query that does not parse as an empty panel."""
    filled = [re.sub(r"\$__rate_interval", "1m", query).replace("$", "") for query in queries_of_the_dashboard()]
    records = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(filled)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}))
    done = subprocess.run([promtool(), "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"],
                                     ["check", "config", "prometheus.yml"]], ids=lambda it: " ".join(it))  # fmt: skip
def test_promtool_accepts_the_alarms(command: list[str]) -> None:
    done = subprocess.run([promtool(), *command], cwd=ALERTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_docs_list_the_alarms() -> None:
    listed = re.findall(r"^\| `(Headwater\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert listed == [rule["alert"] for rule in rules()]


def test_every_alarm_is_tried_both_ways() -> None:
    tried = yaml.safe_load((ALERTS.parent / "alerts_test.yml").read_text())["tests"]
    names = {rule["alert"] for rule in rules()}
    silent = {each["alertname"] for test in tried for each in test.get("alert_rule_test", ())}
    fired = set(re.findall(r'alertname="(\w+)"', json.dumps(tried).replace('\\"', '"')))
    assert silent == fired == names


def test_the_files_that_compose_mounts_are_there() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    mounted = [volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]]
    here = [source for source in mounted if source.startswith("./")]
    assert here
    assert [source for source in here if not (ROOT / "deploy" / source).exists()] == []
