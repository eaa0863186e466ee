"""A client that walks away must not keep pages or slots: seen from outside, in /metrics."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("default server")]


def metric(server: RunningServer, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"no metric {name} {labels}")


def test_leaving_a_stream_frees_its_pages(server: RunningServer) -> None:
    body = {
        "text": "Tell me a long story.",
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        "stream": True,
    }
    with httpx.stream("POST", server.url + "/generate", json=body, timeout=60, trust_env=False) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        assert metric(server, "sglang:num_running_reqs") == 1
        assert metric(server, "headwater_pages", tier="device", owner="private") > 0

    deadline = time.monotonic() + 30
    while metric(server, "sglang:num_running_reqs") and time.monotonic() < deadline:
        time.sleep(0.05)
    owners = ("free", "tree", "private", "retired", "transfer")
    pages = {owner: metric(server, "headwater_pages", tier="device", owner=owner) for owner in owners}
    capacity = metric(server, "headwater_page_capacity", tier="device")
    assert metric(server, "sglang:num_running_reqs") == 0
    assert pages["private"] == 0
    assert pages["free"] + pages["tree"] == capacity, pages
