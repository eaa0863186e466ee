"""Tensor parallelism in real processes: ranks give the text of one process, through tiers, flushes and new weights.

The server has two ranks, which take a KV head each; HEADWATER_TEST_RANKS=4 repeats all of it where two hold the same.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running_server import RunningServer, is_alive
from test_parking import NUM_NEW, ask_together, metric, restored_tokens
from tiered import (
    DEVICE,
    HOST,
    NUM_PROMPTS,
    SAMPLING,
    ask,
    details,
    prompt,
    wait_idle,
    wait_stored,
    write_byte_tokenizer,
)

from tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
NUM_RANKS = int(os.environ.get("HEADWATER_TEST_RANKS", "2"))
LONG = SAMPLING | {"max_new_tokens": NUM_NEW}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other weights of the same shapes."""
    folder = tmp_path_factory.mktemp("other")
    make_tiny_model("llama", folder, seed=5)
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_expected(other_model: str) -> list[list[int]]:
    from headwater import Engine  # here: it imports torch

    with Engine(other_model, dtype="float32", disable_radix_cache=True, log_level="warning") as plain:
        return [plain.generate(input_ids=prompt(n), sampling_params=SAMPLING)["output_ids"] for n in range(4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def arguments(store: Path) -> tuple[str, ...]:
    return (
        *DEVICE, *HOST, "--hicache-ratio", "3", "--hicache-storage-prefetch-policy", "wait_complete",
        "--hicache-storage-backend", "file", "--hicache-storage-dir", str(store),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_model: str, store: Path) -> Iterator[RunningServer]:
    ranks = ("--tp-size", str(NUM_RANKS), "--threads", "1", "--rank-timeout", "4", "--engine-restarts", "5")
    with RunningServer("--model", tiny_model, *arguments(store), *ranks) as running:
        yield running.wait_healthy()


def rank_pids(server: RunningServer) -> list[int]:
    """The processes of ranks 1 and up, in their order: the children of the engine process."""
    tasks = Path(f"/proc/{server.engine_pid()}/task").glob("*/children")
    return sorted(int(pid) for task in tasks for pid in task.read_text().split())


def ask_all(server: RunningServer, numbers: range) -> list[list[int]]:
    with ThreadPoolExecutor(6) as pool:
        return [answer["output_ids"] for answer in pool.map(lambda number: ask(server, number), numbers)]


def test_texts_are_those_of_one_process_under_flushes_of_every_mode(
    server: RunningServer, expected: list[list[int]]
) -> None:
    """Four times what the device holds, so pages go to the host and the store and come back while flushes cut them."""
    assert len(rank_pids(server)) == NUM_RANKS - 1
    for mode in ("now", "drain", "idle"):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask_all, server, range(NUM_PROMPTS))
            flushed = server.post(f"/flush_cache?mode={mode}&timeout=30", headers={"Accept": "application/json"})
            assert asked.result() == expected
            assert flushed.status_code == 200 and flushed.json()["success"], flushed.text
    assert ask_all(server, range(NUM_PROMPTS)) == expected
    wait_idle(server)
    assert restored_tokens(server) > 0
    tiers = server.get("/cache").json()["tiers"]
    assert all(tier["free_pages"] + tier["evictable_pages"] == tier["capacity_pages"] for tier in tiers.values())


def test_a_parked_request_goes_on_with_the_same_text(server: RunningServer) -> None:
    alone = [ask(server, number, sampling_params=LONG)["output_ids"] for number in range(2)]
    before = metric(server, "num_parked")
    for _ in range(5):
        assert ask_together(server) == alone
        if metric(server, "num_parked") > before:
            break
    assert metric(server, "num_parked") > before


def test_new_weights_reach_all_ranks_or_none(
    server: RunningServer,
    tiny_model: str,
    other_model: str,
    expected: list[list[int]],
    other_expected: list[list[int]],
    tmp_path: Path,
) -> None:
    """One rank with old weights, or old KV on one rank, would change the text."""
    assert server.post("/update_weights_from_disk", json={"model_path": other_model}).status_code == 200
    assert ask_all(server, range(4)) == other_expected
    assert server.post("/update_weights_from_disk", json={"model_path": str(tmp_path)}).status_code == 400
    assert ask_all(server, range(4)) == other_expected
    assert server.post("/release_memory_occupation", json={}).status_code == 200
    assert server.post("/resume_memory_occupation", json={}).status_code == 200
    assert ask_all(server, range(4)) == other_expected
    assert server.post("/update_weights_from_disk", json={"model_path": tiny_model}).status_code == 200
    assert ask_all(server, range(4)) == expected[:4]


def test_another_number_of_ranks_reads_what_these_stored(
    server: RunningServer, tiny_model: str, store: Path, expected: list[list[int]]
) -> None:
    """Pages in a store are whole and in the order of heads: four ranks, and one, find two ranks' pages."""
    from headwater import Engine

    ask_all(server, range(NUM_PROMPTS))
    wait_stored(server, 7 * NUM_PROMPTS)
    for tp_size in (4, 1):
        with Engine(
            tiny_model, dtype="float32", max_total_tokens=320, max_running_requests=2, threads=1, tp_size=tp_size,
            enable_hierarchical_cache=True, hicache_restore_policy="always", log_level="warning",
            hicache_storage_prefetch_policy="wait_complete", hicache_storage_backend="file",
            hicache_storage_dir=str(store),
        ) as engine:  # fmt: skip
            answers = [engine.generate(input_ids=prompt(n), sampling_params=SAMPLING) for n in (3, 8)]
            assert [answer["output_ids"] for answer in answers] == [expected[3], expected[8]]
            assert all(details(answer)["storage"] == 112 for answer in answers), answers[0]["meta_info"]


def wait_gone(pids: list[int], server: RunningServer) -> None:
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, server.log
        time.sleep(0.1)


def wait_answered(server: RunningServer, body: dict) -> tuple[int, str]:
    response = server.post("/generate", json=body)
    return response.status_code, response.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_gone_ends_the_engine_and_all_come_back(
    server: RunningServer, expected: list[list[int]], number: signal.Signals
) -> None:
    """Requests that wait for ever for a dead rank, and ranks that outlive their engine."""
    server.wait_healthy()
    before = [server.engine_pid(), *rank_pids(server)]
    long = {"input_ids": prompt(0), "sampling_params": SAMPLING | {"max_new_tokens": 100}}
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(wait_answered, server, long) for _ in range(8)]
        time.sleep(0.05)
        os.kill(before[-1], number)
        found = [answer.result() for answer in answers]
    assert {status for status, _ in found} in ({503}, {200, 503}), found
    wait_gone(before, server)
    how = "was killed by SIGKILL" if number is signal.SIGKILL else ""
    assert f"rank {NUM_RANKS - 1} {how}" in server.log
    server.wait_healthy()
    assert len(rank_pids(server)) == NUM_RANKS - 1
    assert ask_all(server, range(4)) == expected[:4]


def test_ranks_end_with_a_killed_engine_and_with_the_server(server: RunningServer) -> None:
    """Also a stopped one, which reads no pipe."""
    engine, ranks = server.engine_pid(), rank_pids(server)
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(engine, signal.SIGKILL)
    wait_gone([engine, *ranks], server)
    server.wait_healthy()
    pids = [server.engine_pid(), *rank_pids(server)]
    server.process.terminate()
    assert server.wait_exit(20) == 0
    wait_gone(pids, server)
