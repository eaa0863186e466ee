"""`--dp-size 2` with real processes: both serve, flushes are for all, and one that dies is named and comes back."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer
from tiered import DEVICE, ask, prompt

from headwater.bench.machine import open_files
from processes import is_alive

pytestmark = pytest.mark.slow
JSON = {"accept": "application/json"}
LONG = {"temperature": 0, "max_new_tokens": 120, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[RunningServer]:
    """Shared; the last test ends it."""
    arguments = ("--model", tiny_model, *DEVICE, "--dp-size", "2", "--engine-restarts", "4")
    with RunningServer(*arguments) as running:
        yield running.wait_healthy()


def rank_of_process(server: RunningServer) -> dict[int, int]:
    """Engine index to process id, by the socket each of them listens on."""
    ranks = {}
    for pid in server.children():
        sockets = set(open_files(pid))
        for line in Path("/proc/net/unix").read_text().splitlines():
            name = line.rpartition(" ")[2]
            inode = line.split()[6]
            if "/engine-" in name and str(server.temporary) in name and f"socket:[{inode}]" in sockets:
                ranks[int(name.rpartition("/engine-")[2].split("-")[0])] = pid
    return ranks


def flush(server: RunningServer, **parameters: Any) -> httpx.Response:
    return server.post("/flush_cache", json=parameters, headers=JSON)


def test_both_engines_serve_and_give_the_same_text(server: RunningServer) -> None:
    assert len(server.engine_pids()) == 2
    texts = [ask(server, 1, routed_dp_rank=rank) for rank in (0, 1)]
    assert texts[0]["text"] == texts[1]["text"]
    assert [text["meta_info"]["dp_rank"] for text in texts] == [0, 1]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda number: ask(server, number % 12), range(48)))
    assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
    info = server.get("/server_info").json()
    assert (info["dp_size"], len(info["internal_states"])) == (2, 2)
    answer = flush(server, timeout=10)
    assert answer.status_code == 200
    assert [engine["success"] for engine in answer.json()["engines"]] == [True, True]
    for rank in (0, 1):
        assert ask(server, 1, routed_dp_rank=rank)["meta_info"]["cached_tokens"] == 0


def test_new_weights_and_their_label_are_on_both(server: RunningServer, tiny_model: str) -> None:
    body = {"model_path": tiny_model, "weight_version": "next"}
    answer = server.post("/update_weights_from_disk", json=body)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["engines"]
    assert first["weights_id"] == second["weights_id"], "the same files are the same weights"
    for rank in (0, 1):
        assert ask(server, 1, routed_dp_rank=rank)["meta_info"]["weight_version"] == "next"


def test_an_engine_that_is_killed_during_a_flush_is_named_and_comes_back(server: RunningServer) -> None:
    pids = rank_of_process(server)
    assert sorted(pids) == [0, 1]
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            body = {"input_ids": [prompt(1)] * 32, "sampling_params": LONG, "routed_dp_rank": 1}
            server.post("/generate", json=body)

    def pending_ranks() -> list[int]:
        operations = server.get("/control/operations").json()["operations"]
        return [engine["dp_rank"] for operation in operations for engine in operation["engines"]]

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, (server.get("/control/blockers").json(), server.log)
            time.sleep(0.01)

    with ThreadPoolExecutor(5) as pool:
        try:
            for _ in range(4):  # never idle: a client has the time of three batches to send its next one
                pool.submit(keep_busy)
            wait_for(lambda: server.get("/control/blockers").json()["blockers"].get("queued", 0) > 1)
            pending = pool.submit(flush, server, timeout=60, mode="idle")
            wait_for(lambda: pending_ranks() == [1])  # engine 0 was idle and has flushed
            os.kill(pids[1], signal.SIGKILL)
            answer = pending.result(timeout=60)
        finally:
            stop.set()
    assert answer.status_code == 503, answer.text
    facts = answer.json()
    assert facts["message"].startswith("engine 1 is gone: the engine process was killed by SIGKILL (since 20")
    assert "flushed on engine 0, not on engine 1" in facts["message"]
    assert [engine["success"] for engine in facts["engines"]] == [True, False]
    # meanwhile the other one serves, whoever asks
    assert ask(server, 3)["meta_info"]["dp_rank"] == 0
    assert server.health() == 200
    # and a flush waits for the new one to load
    answer = flush(server, timeout=60)
    deadline = time.monotonic() + 60
    while answer.status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.2)
        answer = flush(server, timeout=60)
    assert ask(server, 3, routed_dp_rank=1)["meta_info"]["cached_tokens"] == 0
    assert not is_alive(pids[1])


def test_an_engine_comes_back_with_what_was_told_and_stays_out_while_the_files_are_gone(
    server: RunningServer, tiny_model: str, tmp_path: Path
) -> None:
    told = shutil.copytree(tiny_model, tmp_path / "told")

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, server.log
            time.sleep(0.2)

    def labels() -> list[str | None]:
        return [state.get("weight_version") for state in server.get("/server_info").json()["internal_states"]]

    body = {"model_path": str(told), "weight_version": "told"}
    assert server.post("/update_weights_from_disk", json=body).status_code == 200
    os.kill(rank_of_process(server)[1], signal.SIGKILL)
    wait_until(lambda: labels() == ["told", None])
    wait_until(lambda: labels() == ["told", "told"])
    assert ask(server, 1, routed_dp_rank=1)["meta_info"]["weight_version"] == "told"
    told.rename(tmp_path / "away")
    os.kill(rank_of_process(server)[1], signal.SIGKILL)
    wait_until(lambda: "does not exist" in server.get("/health").text)
    assert server.get("/health").json()["engines_out"][0]["dp_rank"] == 1
    assert ask(server, 3)["meta_info"]["dp_rank"] == 0
    (tmp_path / "away").rename(told)
    wait_until(lambda: labels() == ["told", "told"])


def test_the_server_ends_with_an_engine_that_cannot_come_back(tiny_model: str) -> None:
    with RunningServer("--model", tiny_model, *DEVICE, "--dp-size", "2") as server:
        server.wait_healthy()
        pids = server.engine_pids()
        os.kill(pids[0], signal.SIGKILL)
        assert server.wait_exit(60) == 1
        assert "killed by SIGKILL" in server.log
        assert not any(is_alive(pid) for pid in pids), "the other engine must not be left behind"
        assert list(server.temporary.rglob("*.sock")) == []


def test_ctrl_c_ends_all_engines(server: RunningServer) -> None:
    pids = server.children()
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit(60) == 0
    assert not any(is_alive(pid) for pid in pids)
