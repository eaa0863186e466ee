"""Tensor parallelism in real processes: ranks give the text of one process, through tiers, flushes and new weights.

The server has two engines of two ranks, which take a KV head each; HEADWATER_TEST_RANKS=4 repeats all of it where two
ranks hold the same. Prompt n goes to engine n % 2. A rank that is stopped is a matter of tests/ranks/test_processes.py.
Where there are GPUs, each rank computes on one; with two or three of them there is one engine.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rank_servers import alive_in_session, check_values, hanging_ranks, ranks_by_engine, status, wait_until
from running_server import RunningServer
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
)

from headwater.devices.cuda.driver import has_gpu
from processes import is_alive


def num_cards() -> int:
    if not has_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


NUM_CARDS = num_cards()
NUM_RANKS = int(os.environ.get("HEADWATER_TEST_RANKS", "2"))
NUM_ENGINES = 2 if not NUM_CARDS or NUM_CARDS >= 2 * NUM_RANKS else 1
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(0 < NUM_CARDS < NUM_RANKS, reason="needs a GPU for each rank, or none"),
]
LONG = SAMPLING | {"max_new_tokens": NUM_NEW}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def arguments(store: Path) -> tuple[str, ...]:
    return (
        *DEVICE, *HOST, "--hicache-ratio", "3", "--hicache-storage-prefetch-policy", "wait_complete",
        "--hicache-storage-backend", "file", "--hicache-storage-dir", str(store),
    )  # fmt: skip


@pytest.fixture(scope="module")
def hang_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hang") / "now"


@pytest.fixture(scope="module")
def server(tiny_model: str, store: Path, hang_file: Path) -> Iterator[RunningServer]:
    sizes = ("--dp-size", str(NUM_ENGINES), "--tp-size", str(NUM_RANKS), "--threads", "1", "--engine-restarts", "5")
    with hanging_ranks(hang_file):
        server = RunningServer("--model", tiny_model, *arguments(store), *sizes, "--rank-timeout", "12")
    with server as running:
        yield running.wait_healthy()


def ask_all(server: RunningServer, numbers: range) -> list[list[int]]:
    def one(number: int) -> list[int]:
        return ask(server, number, routed_dp_rank=number % NUM_ENGINES)["output_ids"]

    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(one, numbers))


def test_the_server_shows_its_engines_and_their_ranks(server: RunningServer) -> None:
    assert [len(ranks) for ranks in ranks_by_engine(server).values()] == [NUM_RANKS - 1] * NUM_ENGINES
    info = server.get("/server_info").json()
    assert (info["dp_size"], info["tp_size"], len(info["internal_states"])) == (NUM_ENGINES, NUM_RANKS, NUM_ENGINES)
    assert f"Ranks    {NUM_RANKS} of each engine" in server.log


def test_texts_are_those_of_one_process_under_flushes(server: RunningServer, expected: list[list[int]]) -> None:
    """Twice what the devices hold, so pages go to the host and the store and come back while flushes cut them."""
    for mode in ("now", "drain"):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask_all, server, range(NUM_PROMPTS))
            flushed = server.post(f"/flush_cache?mode={mode}&timeout=60", headers={"Accept": "application/json"})
            assert asked.result() == expected
            assert flushed.status_code == 200, flushed.text
            assert [engine["success"] for engine in flushed.json()["engines"]] == [True] * NUM_ENGINES
    assert ask_all(server, range(NUM_PROMPTS)) == expected
    wait_idle(server)
    assert restored_tokens(server) > 0
    tiers = server.get("/cache").json()["tiers"]
    assert all(tier["free_pages"] + tier["evictable_pages"] == tier["capacity_pages"] for tier in tiers.values())


def test_a_parked_request_goes_on_with_the_same_text(server: RunningServer) -> None:
    alone = [ask(server, n, sampling_params=LONG, routed_dp_rank=0)["output_ids"] for n in range(2)]
    before = metric(server, "num_parked")
    for _ in range(5):
        assert ask_together(server, routed_dp_rank=0) == alone
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
    check_values(server, other_model)
    assert server.post("/update_weights_from_disk", json={"model_path": str(tmp_path)}).status_code == 400
    assert ask_all(server, range(4)) == other_expected
    assert server.post("/release_memory_occupation", json={}).status_code == 200
    assert server.post("/resume_memory_occupation", json={}).status_code == 200
    assert ask_all(server, range(4)) == other_expected
    assert server.post("/update_weights_from_disk", json={"model_path": tiny_model}).status_code == 200
    assert ask_all(server, range(4)) == expected[:4]


def test_one_process_reads_what_ranks_stored(
    server: RunningServer, tiny_model: str, store: Path, expected: list[list[int]]
) -> None:
    """Pages in a store are whole and in the order of heads. test_page_share.py has other numbers of ranks."""
    from headwater import Engine

    ask_all(server, range(NUM_PROMPTS))
    wait_stored(server, 7 * NUM_PROMPTS // NUM_ENGINES)
    with Engine(
        tiny_model, dtype="float32", max_total_tokens=320, max_running_requests=2, threads=1,
        enable_hierarchical_cache=True, hicache_restore_policy="always", log_level="warning",
        hicache_storage_prefetch_policy="wait_complete", hicache_storage_backend="file",
        hicache_storage_dir=str(store),
    ) as engine:  # fmt: skip
        answers = [engine.generate(input_ids=prompt(n), sampling_params=SAMPLING) for n in (2, 8)]
        assert [answer["output_ids"] for answer in answers] == [expected[2], expected[8]]
        assert all(details(answer)["storage"] == 112 for answer in answers), answers[0]["meta_info"]


def test_a_rank_that_is_killed_ends_its_engine_alone_and_all_its_ranks_come_back(
    server: RunningServer, expected: list[list[int]]
) -> None:
    """Requests that wait for ever for a dead rank, ranks that outlive their engine, and another engine that suffers."""
    before = ranks_by_engine(server)
    (gone, ranks), *others = before.items()
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(status, server, number % NUM_ENGINES, 100) for number in range(24)]
        time.sleep(0.05)  # more than the engines do meanwhile
        os.kill(ranks[-1], signal.SIGKILL)
        found = [{answer.result() for answer in answers[engine::NUM_ENGINES]} for engine in range(NUM_ENGINES)]
    assert sorted(503 in it for it in found) == [False] * (NUM_ENGINES - 1) + [True], found
    assert set.union(*found) <= {200, 503}
    wait_until(lambda: not any(is_alive(pid) for pid in (gone, *ranks)), server)
    assert f"rank {NUM_RANKS - 1} was killed by SIGKILL" in server.log
    wait_until(lambda: [status(server, engine, 1) for engine in range(NUM_ENGINES)] == [200] * NUM_ENGINES, server)
    after = ranks_by_engine(server)
    assert [len(ranks) for ranks in after.values()] == [NUM_RANKS - 1] * NUM_ENGINES
    assert all(after[engine] == its_ranks for engine, its_ranks in others)
    assert ask_all(server, range(4)) == expected[:4]


def test_a_rank_that_hangs_though_its_process_lives_ends_its_engine(
    server: RunningServer, hang_file: Path, expected: list[list[int]]
) -> None:
    """Rank 0 waits in a sum, on a GPU for ever. The answer names the rank, also if the engine was ended by force."""
    before = ranks_by_engine(server)
    hang_file.touch()
    body = {"input_ids": prompt(0), "sampling_params": SAMPLING, "routed_dp_rank": 0}
    answer = server.post("/generate", json=body)
    hang_file.unlink()
    assert answer.status_code == 503, answer.text
    others = "".join(f" and rank {rank}" for rank in range(2, NUM_RANKS))
    assert re.search(rf"rank 1{others}( and rank 0)? (has|have) not finished a step for", answer.text), answer.text
    wait_until(lambda: [status(server, engine, 1) for engine in range(NUM_ENGINES)] == [200] * NUM_ENGINES, server)
    gone = set(before) - set(ranks_by_engine(server))
    assert len(gone) == 1, "the other engine goes on"
    assert not any(is_alive(pid) for engine in gone for pid in (engine, *before[engine]))
    assert ask_all(server, range(4)) == expected[:4]


def test_ranks_end_with_a_killed_engine_and_with_the_server(server: RunningServer) -> None:
    """Also a stopped one, which reads no pipe; the server ends while an engine and its ranks come back."""
    engine, ranks = next(iter(ranks_by_engine(server).items()))
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in (engine, *ranks)), server)
    if NUM_ENGINES > 1:
        assert len(alive_in_session(server.process.pid)) > NUM_RANKS, "the other engine goes on"
    server.process.terminate()
    assert server.wait_exit(60) == 0
    wait_until(lambda: not alive_in_session(server.process.pid), server)


@pytest.mark.skipif(NUM_CARDS < 2, reason="needs two GPUs")
def test_engines_of_one_rank_take_a_gpu_each(tiny_model: str, expected: list[list[int]]) -> None:
    with RunningServer("--model", tiny_model, *DEVICE, "--dp-size", "2") as server:
        server.wait_healthy()
        assert "engine 0 on 0, engine 1 on 1" in server.log
        asked = [(number, engine) for number in range(4) for engine in range(2)]
        answers = [ask(server, number, routed_dp_rank=engine)["output_ids"] for number, engine in asked]
        assert answers == [expected[number] for number, _ in asked]
