"""Requests that outgrow the device together: one is parked on the host, goes on, and nobody's text changes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from running_server import RunningServer
from tiered import TIERS, ask, wait_idle

pytestmark = pytest.mark.slow
NUM_NEW = 120  # a prompt of 8 pages and so many tokens are 15 pages; the device has 20
LONG = {"sampling_params": {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}}


def metric(server: RunningServer, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"headwater:{name}_total{{"))


def test_a_running_request_is_parked_on_the_host_and_resumed(tiny_model: str) -> None:
    with RunningServer("--model", tiny_model, *TIERS, "--hicache-ratio", "3").wait_healthy() as server:
        alone = [ask(server, number, **LONG)["output_ids"] for number in range(2)]
        assert metric(server, "num_parked") == 0
        wait_idle(server)
        assert server.post("/flush_cache?timeout=10").status_code == 200
        before = server.get("/cache").json()["transfers"]["restore"]["tokens"]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda number: ask(server, number, **LONG), range(2)))
        assert [answer["output_ids"] for answer in answers] == alone
        assert [len(ids) for ids in alone] == [NUM_NEW, NUM_NEW]
        assert metric(server, "num_parked") >= 1
        restored = server.get("/cache").json()["transfers"]["restore"]["tokens"] - before
        assert restored > 0, "what the other took of its pages comes back from the host and is not computed again"
        wait_idle(server)
        tiers = server.get("/cache").json()["tiers"]
        assert all(tier["free_pages"] + tier["evictable_pages"] == tier["capacity_pages"] for tier in tiers.values())
