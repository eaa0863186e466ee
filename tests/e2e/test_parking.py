"""Requests that outgrow the device together: one is parked on the host, goes on, and nobody's text changes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from running_server import RunningServer
from tiered import TIERS, ask, wait_idle

pytestmark = pytest.mark.slow
NUM_NEW = 120  # a prompt of 8 pages and so many tokens are 15 pages; the device has 20
LONG = {"sampling_params": {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}}


def metric(server: RunningServer, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"headwater_{name}_total{{"))


def wait_waiting(server: RunningServer, num_requests: int, limit_s: float = 120.0) -> None:
    """Wait until so many requests have come to the engine."""
    deadline = time.monotonic() + limit_s
    while server.get("/v1/loads").json()["loads"][0]["num_waiting_reqs"] < num_requests:
        assert time.monotonic() < deadline, server.get("/v1/loads").text
        time.sleep(0.02)


def restored_tokens(server: RunningServer) -> float:
    return server.get("/cache").json()["transfers"]["restore"]["tokens"]


def ask_together(server: RunningServer, **more: object) -> list[list[int]]:
    """The output ids of two long answers that begin in one step of engine 0, however slow the machine is."""
    wait_idle(server)
    assert server.post("/flush_cache?timeout=10").status_code == 200
    with ThreadPoolExecutor(2) as pool:
        server.post("/pause_generation", json={"mode": "in_place"})
        answers = pool.map(lambda number: ask(server, number, **LONG, **more), range(2))
        wait_waiting(server, 2)
        server.post("/continue_generation", json={})
        return [answer["output_ids"] for answer in answers]


def test_a_running_request_is_parked_on_the_host_and_resumed(tiny_model: str) -> None:
    with RunningServer("--model", tiny_model, *TIERS, "--hicache-ratio", "3").wait_healthy() as server:
        alone = [ask(server, number, **LONG)["output_ids"] for number in range(2)]
        assert [len(ids) for ids in alone] == [NUM_NEW, NUM_NEW]
        assert metric(server, "num_parked") == 0
        before = restored_tokens(server)
        for _ in range(5):  # where copies are slow beside other work, computing again may be the better choice once
            assert ask_together(server) == alone
            if restored_tokens(server) > before:
                break
        assert metric(server, "num_parked") >= 1
        assert restored_tokens(server) > before, "what the other took of its pages comes back from the host"
        wait_idle(server)
        tiers = server.get("/cache").json()["tiers"]
        assert all(tier["free_pages"] + tier["evictable_pages"] == tier["capacity_pages"] for tier in tiers.values())
