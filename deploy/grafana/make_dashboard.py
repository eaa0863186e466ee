#!/usr/bin/env python3
"""Writes headwater.json, the Grafana dashboard, beside this file: `python deploy/grafana/make_dashboard.py`.

Rows and panels are the tables below; everything else is the same for each panel.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OF = 'instance=~"$instance", model_name=~"$model"'  # of every series
PANEL_HEIGHT = 8
WIDTH = 24
STACKED = {"stacking": {"mode": "normal"}, "fillOpacity": 60, "lineWidth": 0}


def quantiles(name: str, by: str = "") -> list[tuple[str, str]]:
    """The median and the 99th percentile of a histogram."""
    labels, legend = (f"{by}, le", f"{{{{{by}}}}} ") if by else ("le", "")
    return [
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate({name}_bucket{{{OF}}}[$__rate_interval])))",
            f"{legend}{text}",
        )
        for q, text in ((0.5, "p50"), (0.99, "p99"))
    ]


def rate(name: str, by: str, where: str = "") -> list[tuple[str, str]]:
    """A counter per second, by label."""
    return [(f"sum by ({by}) (rate({name}{{{OF}{where}}}[$__rate_interval]))", f"{{{{{by}}}}}")]


def total(name: str, by: str, where: str = "") -> list[tuple[str, str]]:
    """A gauge, summed by label."""
    return [(f"sum by ({by}) ({name}{{{OF}{where}}})", f"{{{{{by}}}}}")]


def summed(name: str, legend: str) -> tuple[str, str]:
    return f"sum({name}{{{OF}}})", legend


def per_second(name: str, legend: str) -> tuple[str, str]:
    return f"sum(rate({name}{{{OF}}}[$__rate_interval]))", legend


def owners(tier: str) -> list[tuple[str, str]]:
    where = f', tier="{tier}"'
    return [(f"sum by (owner) (headwater_pages{{{OF}{where}}} * on (instance, dp_rank, tier) group_left () "
             f"headwater_page_bytes{{{OF}{where}}})", "{{owner}}")]  # fmt: skip


HIT_RATE = (
    f"sum by (cache_source) (rate(sglang:cached_tokens_total{{{OF}}}[$__rate_interval])) / ignoring (cache_source) "
    f"group_left () sum(rate(sglang:prompt_tokens_total{{{OF}}}[$__rate_interval]))"
)
SPEED = (
    f"sum by (kind) (rate(headwater_transfer_bytes_total{{{OF}}}[$__rate_interval])) / "
    f"sum by (kind) (rate(headwater_transfer_seconds_total{{{OF}}}[$__rate_interval]))"
)
# row -> (title, unit, queries, custom)
ROWS: dict[str, list[tuple[str, str, list[tuple[str, str]], dict[str, Any]]]] = {
    "Requests": [
        ("Requests by state", "short", [
            summed("sglang:num_running_reqs", "running"), summed("sglang:num_queue_reqs", "waiting"),
            summed("sglang:num_retracted_reqs", "retracted"), summed("sglang:num_paused_reqs", "paused"),
        ], {}),
        ("Tokens per second", "short", [
            per_second("sglang:prompt_tokens_total", "prompt"),
            per_second("sglang:generation_tokens_total", "generated"),
        ], {}),
        ("Requests per second", "reqps", [
            per_second("sglang:num_requests_total", "ended"),
            per_second("sglang:num_aborted_requests_total", "aborted"),
            *rate("headwater_limited_requests_total", "reason"),
        ], {}),
        ("Time to first token", "s", quantiles("sglang:time_to_first_token_seconds"), {}),
        ("Between tokens", "s", quantiles("sglang:inter_token_latency_seconds"), {}),
        ("Stages of a request", "s", quantiles("headwater_request_stage_seconds", "stage"), {}),
        ("Whole request", "s", quantiles("sglang:e2e_request_latency_seconds"), {}),
        ("Tokens of a request", "short", [
            *((q, f"prompt {text}") for q, text in quantiles("sglang:prompt_tokens_histogram")),
            *((q, f"answer {text}") for q, text in quantiles("sglang:generation_tokens_histogram")),
        ], {}),
        ("Prompt tokens that wait", "short", [summed("headwater_queued_tokens", "tokens")], {}),
    ],
    "Cache": [
        ("Prompt tokens found, by tier", "percentunit", [(HIT_RATE, "{{cache_source}}")], STACKED),
        ("Device, by owner", "bytes", owners("device"), STACKED),
        ("Host, by owner", "bytes", owners("host"), STACKED),
        ("Page lifetime", "s", quantiles("headwater_page_lifetime_seconds", "tier"), {}),
        ("Idle before eviction", "s", quantiles("headwater_page_idle_before_eviction_seconds", "tier"), {}),
        ("Gap between two uses", "s", quantiles("headwater_page_reuse_gap_seconds", "tier"), {}),
        ("Evicted and retired tokens per second", "short", [
            per_second("headwater_evicted_tokens_total", "evicted"),
            per_second("headwater_retired_tokens_total", "retired"),
        ], {}),
        ("Requests that gave their pages back", "short", [
            per_second("headwater_num_retractions_total", "retracted"),
            per_second("headwater_num_parked_total", "parked"),
        ], {}),
        ("Namespaces", "short", [summed("headwater_namespaces", "namespaces")], {}),
    ],
    "Flushes and control": [
        ("Flushes per second, by mode and outcome", "short", [
            (f"sum by (mode, outcome) (rate(headwater_flushes_total{{{OF}}}[$__rate_interval]))",
             "{{mode}} {{outcome}}"),
        ], {}),
        ("Flushes waited", "s", quantiles("headwater_flush_waited_seconds", "mode"), {}),
        ("Expired flushes, by what was in flight", "short", rate("headwater_flush_blocked_total", "blocker"), {}),
        ("Blockers", "short", total("headwater_blockers", "blocker"), STACKED),
        ("Pending operations", "short", total("headwater_operations_pending", "kind"), {}),
        ("Flushed pages that still drain", "short", total("headwater_pages", "tier", ', owner="retired"'), {}),
        ("Retired pages per second", "short", [
            per_second("headwater_retired_pages_freed_total", "free at once"),
            per_second("headwater_retired_pages_held_total", "held by requests"),
        ], {}),
        ("Generation", "short", total("headwater_cache_generation", "dp_rank"), {}),
        ("Paused engines", "short", [summed("headwater_paused", "paused")], {}),
    ],
    "Tiers and store": [
        ("Copies", "Bps", rate("headwater_transfer_bytes_total", "kind"), {}),
        ("Speed of a copy", "Bps", [(SPEED, "{{kind}}")], {}),
        ("Tokens that did not reach a tier", "short", rate("headwater_dropped_tokens_total", "cause"), {}),
        ("Store: what happened, per second", "short", [
            (f"sum by (event) (deriv(headwater_storage_events{{{OF}}}[$__rate_interval]))", "{{event}}"),
        ], {}),
        ("Store: bytes", "bytes", [
            summed("headwater_storage_bytes", "used"), summed("headwater_storage_capacity_bytes", "capacity"),
        ], {}),
        ("Circuit breaker", "short", total("headwater_storage_breaker", "state"), STACKED),
    ],
    "Engines": [
        ("Engines that answer", "short", total("headwater_engine_up", "instance"), {}),
        ("Since the start", "s", total("headwater_uptime_seconds", "dp_rank"), {}),
        ("Memory by use", "bytes", total("headwater_memory_bytes", "part"), STACKED),
    ],
}  # fmt: skip
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]], custom: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8} | custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(queries)
        ],
    }


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        found.append({"id": len(found) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                      "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})  # fmt: skip
        y += 1
        for index, (name, unit, queries, custom) in enumerate(row):
            place = {"x": index % 3 * 8, "y": y + index // 3 * PANEL_HEIGHT, "w": 8, "h": PANEL_HEIGHT}
            found.append(panel(len(found) + 1, name, unit, queries, custom) | {"gridPos": place})
        y += -(-len(row) // 3) * PANEL_HEIGHT
    return found


def choice(name: str, label: str, query: str) -> dict[str, Any]:
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": query, "definition": query,
            "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*",
            "current": {"text": "All", "value": "$__all"}}  # fmt: skip


def dashboard() -> dict[str, Any]:
    return {
        "uid": "headwater",
        "title": "Headwater",
        "tags": ["llm", "headwater"],
        "schemaVersion": 41,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            choice("instance", "Server", "label_values(headwater_engine_up, instance)"),
            choice("model", "Model", 'label_values(headwater_engine_up{instance=~"$instance"}, model_name)'),
        ]},
        "panels": panels(),
    }  # fmt: skip


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "headwater.json").write_text(text())
