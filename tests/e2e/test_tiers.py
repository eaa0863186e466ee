"""The tiers in real processes: what is found on them, what survives, and that the text is the same."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_server import RunningServer
from tiered import (
    NUM_CACHED,
    NUM_PROMPTS,
    TIERS,
    ask,
    details,
    prompt,
    put_store,
    store_of,
    wait_idle,
    wait_stored,
)

pytestmark = pytest.mark.slow
MAIN = range(NUM_PROMPTS)


def file_server(model: str, folder: Path, *more: str) -> RunningServer:
    store = ("--hicache-storage-backend", "file", "--hicache-storage-dir", str(folder))
    return RunningServer("--model", model, *TIERS, *store, *more).wait_healthy()


@pytest.fixture(scope="module")
def folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]]) -> Path:
    """A store in which a server has left the pages of every prompt; that server's own hits are checked here."""
    folder = tmp_path_factory.mktemp("store")
    with file_server(tiny_model, folder, "--hicache-ratio", "1.5") as server:
        for number in MAIN:
            assert ask(server, number)["output_ids"] == expected[number]
        wait_stored(server, NUM_PROMPTS * NUM_CACHED // 16)
        found = {"device": 0, "host": 0, "storage": 0}
        for number in reversed(MAIN):
            answer = ask(server, number)
            assert answer["output_ids"] == expected[number], f"prompt {number}, found on {details(answer)}"
            for tier, num_tokens in details(answer).items():
                found[tier] += num_tokens
        assert all(num_tokens >= NUM_CACHED for num_tokens in found.values()), f"a tier was not tried: {found}"
        state = server.get("/cache").json()
        assert state["evicted_tokens"] > 0
    return folder


@pytest.fixture(scope="module")
def shared(tiny_model: str, folder: Path) -> Iterator[RunningServer]:
    """A server that was started on the folder; each test gives it the store that it needs."""
    with file_server(tiny_model, folder) as server:
        yield server


def use_store(server: RunningServer, folder: Path) -> None:
    """From here on this folder is the store, and nothing is on the other tiers."""
    attached = put_store(
        server,
        hicache_storage_backend="file",
        directory=str(folder),
        hicache_storage_prefetch_policy="wait_complete",
    )
    assert attached.status_code == 200, attached.text
    assert server.post("/flush_cache?timeout=20&tiers=device,host").status_code == 200


def test_a_restarted_server_finds_everything_in_the_store(
    shared: RunningServer, expected: list[list[int]]
) -> None:
    for number in MAIN:
        answer = ask(shared, number)
        assert answer["output_ids"] == expected[number]
        assert details(answer) == {"device": 0, "host": 0, "storage": NUM_CACHED}


def test_two_servers_share_a_folder_and_salts_isolate(
    shared: RunningServer, tiny_model: str, tmp_path: Path, expected: list[list[int]]
) -> None:
    use_store(shared, tmp_path / "s")
    with file_server(tiny_model, tmp_path / "s") as one:
        assert ask(one, 0, cache_salt="tenant")["output_ids"] == expected[0]
        wait_stored(one, NUM_CACHED // 16)
        for salt, num_found in (("other", 0), ("", 0), ("tenant", NUM_CACHED)):
            answer = ask(shared, 0, cache_salt=salt)
            assert (details(answer)["storage"], answer["output_ids"]) == (num_found, expected[0]), salt
        assert shared.post("/hicache/storage-backend/clear").status_code == 200
        assert one.post("/flush_cache?timeout=20").status_code == 200
        assert details(ask(one, 0, cache_salt="tenant")) == {"device": 0, "host": 0, "storage": 0}


def test_killed_in_the_middle_of_writes_leaves_no_partial_page(
    shared: RunningServer, tiny_model: str, tmp_path: Path, expected: list[list[int]]
) -> None:
    """What the killed server had stored is whole; what it had not is computed."""
    with file_server(tiny_model, tmp_path / "s") as server:
        answers = [threading.Thread(target=_ask_quietly, args=(server, number)) for number in MAIN]
        for thread in answers:
            thread.start()
        while store_of(server)["counters"].get("write_stored", 0) < 5:
            time.sleep(0.005)
        os.kill(server.engine_pid(), signal.SIGKILL)
        for thread in answers:
            thread.join(60)
    use_store(shared, tmp_path / "s")
    results = [ask(shared, number) for number in MAIN]
    assert [answer["output_ids"] for answer in results] == expected
    assert sum(details(answer)["storage"] for answer in results) >= 16
    assert store_of(shared)["counters"].get("read_corrupt", 0) == 0


def _ask_quietly(server: RunningServer, number: int) -> None:
    with contextlib.suppress(AssertionError, httpx.TransportError):  # the server is killed under it
        ask(server, number)


def test_flipped_bits_in_files_are_misses_and_never_text(
    shared: RunningServer, folder: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    """One bit in every page, in its header, its checksum or its content: every one is detected."""
    shutil.copytree(folder, tmp_path / "s")
    pages = [path for path in (tmp_path / "s").rglob("*") if path.is_file() and path.stat().st_size > 4_000]
    assert len(pages) >= NUM_PROMPTS * NUM_CACHED // 16
    for index, path in enumerate(pages):
        content = bytearray(path.read_bytes())
        bit = index * 8 if index < 90 else index * 7919 % (len(content) * 8)  # all over the header, then anywhere
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    use_store(shared, tmp_path / "s")
    answers = [ask(shared, number) for number in MAIN]
    assert [answer["output_ids"] for answer in answers] == expected
    assert all(details(answer)["storage"] == 0 for answer in answers)
    wait_idle(shared)
    assert store_of(shared)["counters"]["read_corrupt"] == NUM_PROMPTS * NUM_CACHED // 16


def test_detach_and_attach_in_the_middle_of_traffic(
    shared: RunningServer, folder: Path, expected: list[list[int]]
) -> None:
    """Nobody waits for idle, nobody is lost; afterwards the store serves hits again."""
    assert shared.delete("/hicache/storage-backend").status_code == 200
    assert shared.post("/flush_cache?timeout=20").status_code == 200
    results: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda n=number: results.update({n: ask(shared, n)["output_ids"]})) for number in MAIN
    ]
    for thread in threads:
        thread.start()
    for _ in range(3):
        attached = put_store(shared, hicache_storage_backend="file", directory=str(folder))
        assert attached.status_code == 200, attached.text
        assert shared.delete("/hicache/storage-backend").status_code == 200
    for thread in threads:
        thread.join(120)
    assert [results[number] for number in MAIN] == expected
    use_store(shared, folder)
    assert details(ask(shared, 0))["storage"] == NUM_CACHED


def test_pin_and_warm_through_a_full_pool(
    shared: RunningServer, tmp_path: Path, expected: list[list[int]]
) -> None:
    """A pinned prefix is found on the device after four times the pool has gone through it."""
    use_store(shared, tmp_path / "s")
    pinned = shared.post("/cache/pin", json={"input_ids": prompt(0), "ttl_s": 600}).json()
    assert pinned["num_tokens"] == NUM_CACHED
    for number in MAIN[1:]:
        assert ask(shared, number)["output_ids"] == expected[number]
    answer = ask(shared, 0)
    assert (details(answer)["device"], answer["output_ids"]) == (NUM_CACHED, expected[0])
    warmed = shared.post("/cache/warm", json={"input_ids": prompt(1)}).json()
    assert warmed["items"][0]["cached_tokens_details"]["device"] + warmed["cached_tokens"] >= NUM_CACHED
    unpinned = shared.delete(f"/cache/pin/{pinned['pin_id']}")
    assert unpinned.status_code == 200 and shared.get("/cache/pins").json()["pins"] == []
